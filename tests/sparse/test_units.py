"""The engine's own unit tests, built with it."""

import subprocess


def test_engine_unit_tests_pass(engine_build):
    done = subprocess.run([str(engine_build / "engine-tests"), "--no-colors"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " 0 failed" in done.stdout and "test cases:   0" not in done.stdout
