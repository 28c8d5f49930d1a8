"""`powerquant doctor`: the checks run for real, here and with one thing broken at a time."""

import json
import os
import stat

import pytest

from vllm_powerquant import doctor
from vllm_powerquant.cli import main

pytest.importorskip("transformers")


def run(check) -> dict[str, doctor.Check]:
    return {found.name: found for found in check()}


@pytest.mark.slow
def test_everything_that_is_installed_here_works(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = [check["name"] for check in report["checks"]]
    assert {"torch", "CPU", "GPU", "vLLM", "codec", "CPU kernels", "sparse engine", "embedded model"} <= set(names)
    assert report["problems"] == 0
    assert all(check["advice"] for check in report["checks"] if check["status"] == "warn")


def test_a_problem_is_told_with_what_to_do_and_exit_code_1(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_vllm", lambda: iter(()))  # tried above, takes ten seconds
    monkeypatch.setenv("POWERQUANT_KEY_BITS", "5")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert (
        "fail POWERQUANT_ variables: POWERQUANT_KEY_BITS must be 2, 3, 4 or 8, got 5\n     -> correct or unset it\n" in out
    )
    assert out.endswith("1 problem found\n") and "\x1b" not in out
    assert "ok   torch: " in out


def test_a_fault_of_the_doctor_itself_is_exit_code_2(capsys, monkeypatch):
    def broken():
        raise KeyError("nothing")

    monkeypatch.setattr(doctor, "checks", broken)
    assert main(["doctor"]) == 2
    assert "doctor could not run" in capsys.readouterr().err


def test_cache_folder_that_cannot_be_written(monkeypatch):
    monkeypatch.setenv("POWERQUANT_CACHE_DIR", "/proc/nothing")
    (check,) = run(doctor._cache).values()
    assert check.status == "fail" and "POWERQUANT_CACHE_DIR" in check.advice


def test_engine_that_does_not_run(monkeypatch, tmp_path):
    server = tmp_path / "powerinfer-server"
    server.write_text("#!/bin/sh\nexit 3\n")
    server.chmod(server.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("POWERQUANT_ENGINE", str(server))
    assert run(doctor._engine)["sparse engine"].status == "fail"
    monkeypatch.setenv("POWERQUANT_ENGINE", str(tmp_path / "nothing"))
    check = run(doctor._engine)["sparse engine"]
    assert check.status == "fail" and "POWERQUANT_ENGINE must name" in check.found


def test_kernels_without_a_compiler(monkeypatch, tmp_path):
    from vllm_powerquant.attention.kernels import cpu_build, cpu_kernels

    if doctor.info.gpus():
        pytest.skip("a GPU does without them")
    monkeypatch.setenv("POWERQUANT_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "/nothing/g++")
    cpu_build.build.cache_clear()
    cpu_kernels._load.cache_clear()
    try:
        check = run(doctor._kernels)["CPU kernels"]
    finally:
        cpu_build.build.cache_clear()
        cpu_kernels._load.cache_clear()
    assert check.status == "fail" and "no C++ compiler" in check.found or "CXX=/nothing/g++ was not found" in check.found


def test_packages_out_of_range_and_missing_models(monkeypatch):
    wanted = doctor._wanted("torch")
    if wanted is not None:
        assert wanted.contains("2.12.0") and not wanted.contains("2.10.0")
        monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "2.10.0")
        check = doctor._in_range(doctor.Check("torch", "ok", "2.10.0"), "torch")
        assert check.status == "fail" and "2.10.0" in check.found and check.advice.startswith("pip install 'torch")
    monkeypatch.undo()
    monkeypatch.setenv("POWERQUANT_MODEL_GGUF", os.devnull + "x")
    assert run(doctor._model)["embedded model"].status == "fail"


def test_info_tells_of_the_model_and_the_backend(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backend"] in ("transformers", "vllm") and facts["model"]["gguf"].endswith(".gguf")
