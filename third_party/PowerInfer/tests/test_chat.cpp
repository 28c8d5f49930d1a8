#include <doctest/doctest.h>

#include <chrono>

#include "chat.h"
#include "errors.h"
#include "toy_model.h"

using namespace powerinfer;

namespace {

const ToyTokenizer kTokenizer;

std::string rendered(const std::string& source, const std::vector<Message>& messages = {{"user", "hi"}},
                     bool prompt = true) {
  return ChatTemplate::from_source(source, kTokenizer).render(messages, prompt);
}

}  // namespace

TEST_CASE("named formats") {
  const std::vector<Message> talk = {{"system", "s"}, {"user", "u1"}, {"assistant", " a1 "}, {"user", "u2"}};
  const auto named = [&](const char* name) { return ChatTemplate::from_name(name, kTokenizer).render(talk, true); };
  CHECK(named("chatml") ==
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu1<|im_end|>\n<|im_start|>assistant\n a1 <|im_end|>\n"
        "<|im_start|>user\nu2<|im_end|>\n<|im_start|>assistant\n");
  CHECK(named("llama2") == "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nu1 [/INST] a1 </s><s>[INST] u2 [/INST]");
  CHECK(
      named("llama3") ==
      "<s><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nu1<|eot_id|>"
      "<|start_header_id|>assistant<|end_header_id|>\n\na1<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nu2<|eot_id|>"
      "<|start_header_id|>assistant<|end_header_id|>\n\n");
  CHECK(named("vicuna") == "<s>s USER: u1 ASSISTANT:  a1 </s>USER: u2 ASSISTANT:");
  CHECK(named("bamboo") == named("vicuna"));
  CHECK(ChatTemplate::is_name("llama3"));
  CHECK(!ChatTemplate::is_name("llama4"));
  CHECK(ChatTemplate::from_name("chatml", kTokenizer).adds_special_tokens());
  CHECK(!ChatTemplate::from_name("llama2", kTokenizer).adds_special_tokens());
  CHECK_THROWS_AS(ChatTemplate::from_name("llama2", kTokenizer).render({{"assistant", "a"}}, true), Error);
}

TEST_CASE("white space: trim_blocks, lstrip_blocks and the signs") {
  CHECK(rendered("a\n  {% if true %}\nb\n  {% endif %}\nc\n") == "a\nb\nc");
  CHECK(rendered("a {%- if true %} b {% endif -%} c") == "a b c");
  CHECK(rendered("  {{ 1 }}\n  {{- 2 }}\n x {{ 3 -}}\n y") == "  12\n x 3y");
  CHECK(rendered("{# c #}\nx{% if true %}  {% endif %}") == "x  ");
  CHECK(rendered("a\n  {%+ if true %}b{% endif +%}\n") == "a\n  b");
}

TEST_CASE("expressions") {
  CHECK(rendered("{{ 1 + 2 * 3 - 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }}") == "4 -4 2");
  CHECK(rendered("{{ 'a' ~ 1 ~ true ~ none }}") == "a1TrueNone");
  CHECK(rendered("{{ 'x' if false else 'y' }}{{ 'z' if false }}") == "y");
  CHECK(rendered("{{ messages[0].role }}{{ messages[-1]['content'] }}{{ messages | length }}") == "userhi1");
  CHECK(rendered("{{ 'abc'[1:] }}{{ 'abc'[::-1] }}{{ 'h\u00e9llo'[1] }}{{ 'abc'[-1] }}") == "bccba\u00e9c");
  CHECK(rendered("{{ 'a' in 'cat' }}{{ 'x' not in ['x'] }}{{ missing is defined }}{{ missing is not defined }}") ==
        "TrueFalseFalseTrue");
  CHECK(rendered("{{ (1 < 2 < 3) and not (2 == 3) or false }}") == "True");
  CHECK(rendered("{{ ' a '.strip() + ' b ' | trim + 'c' }}") == "abc");
  CHECK(rendered("{{ '\u3000\u00a0x\u2003' | trim }}") == "x");
  CHECK(rendered("{{ '<\u20ac<<x>\u20ac>'.strip('<\u20ac>') }}{{ '--y--'.rstrip('-') }}{{ '--z-' | trim('-') }}") ==
        "x--yz");
  CHECK(rendered("{{ 'a,b'.split(',')[1] }}{{ 'user'.title() }}{{ 'x' | upper }}{{ missing | default('d') }}") == "bUserXd");
  CHECK(rendered("{{ 'l1\\nl2\\t\\u20ac' }}") == "l1\nl2\t\u20ac");
  CHECK(rendered("{{ {'a': 1}.get('a') }}{{ {'a': 1}['b'] | default('-') }}") == "1-");
}

TEST_CASE("statements") {
  CHECK(rendered("{% for i in range(3) %}{{ loop.index0 }}{{ ',' if not loop.last }}{% endfor %}") == "0,1,2");
  CHECK(rendered("{% set x = 1 %}{% for i in [1] %}{% set x = 2 %}{% endfor %}{{ x }}") == "1");
  CHECK(rendered("{% set n = namespace(x=1) %}{% for i in [1] %}{% set n.x = 2 %}{% endfor %}{{ n.x }}") == "2");
  CHECK(rendered("{% for i in [1,2,3] if i != 2 %}{{ i }}{% else %}none{% endfor %}") == "13");
  CHECK(rendered("{% for i in [] %}{{ i }}{% else %}none{% endfor %}") == "none");
  CHECK(rendered("{% for k, v in {'a': 'b'}.items() %}{{ k }}{{ v }}{% endfor %}") == "ab");
  CHECK(rendered("{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i "
                 "}}{% endfor %}") == "013");
  CHECK(rendered("{% set x %}a{{ 1 }}{% endset %}{{ x }}{{ x }}") == "a1a1");
  CHECK(rendered("{% if false %}a{% elif true %}b{% else %}c{% endif %}") == "b");
}

TEST_CASE("what is not known is refused, and only where it is needed") {
  for (const char* source :
       {"{% macro m() %}{% endmacro %}", "{% include 'x' %}", "{{ 1 ", "{% if true %}", "{% endif %}", "{{ 'a }}", "{{ }}",
        "{{ a b }}", "{% for %}{% endfor %}", "{{ 2 ** 3 }}", "{{ '\\101' }}", "{# x"}) {
    CAPTURE(source);
    CHECK_THROWS_WITH_AS(rendered(source), doctest::Contains("send the text or its tokens to /v1/completions"), Error);
  }
  for (const char* source :
       {"{{ messages | tojson }}", "{{ undefined_function() }}", "{{ 'a' + 1 }}", "{{ messages }}", "{{ 1.5 + 1 }}",
        "{{ missing.x }}", "{{ 'a' | nosuch }}", "{{ 1 is nosuch }}", "{{ 1 // 0 }}"}) {
    CAPTURE(source);
    CHECK_THROWS_WITH_AS(rendered(source), doctest::Contains("send the text or its tokens to /v1/completions"), Error);
    CHECK(rendered(std::string("{% if tools %}") + source + "{% endif %}ok") == "ok");
  }
  CHECK_THROWS_WITH_AS(rendered("{{ raise_exception('no ' + messages[0].role) }}"), doctest::Contains("no user"), Error);
}

TEST_CASE("no template exhausts the stack, the time or the memory") {
  std::string nested, chain = "{{ 1", blocks, calls = "{{ x";
  for (int i = 0; i < 100000; ++i) {
    nested += "(";
    chain += " + 1";
    blocks += "{% if true %}";
    calls += ".a";
  }
  for (const std::string& source :
       {"{{ " + nested, chain + " }}", blocks, calls + " }}", "{{ " + std::string(100000, '-') + "1 }}",
        std::string("{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"),
        std::string("{% set n = namespace(x='aaaaaaaa') %}{% for i in range(64) %}{% set n.x = n.x + n.x %}{% endfor %}"),
        std::string("{% for a in range(99999999999) %}{% endfor %}")}) {
    CHECK_THROWS_AS(rendered(source), Error);
  }
}

TEST_CASE("the messages are not copied: their number, parts and order are cheap to ask for") {
  const std::vector<Message> messages(100'000, {"user", std::string(200, 'x')});
  const auto start = std::chrono::steady_clock::now();
  const std::string text = rendered(
      "{% for m in messages %}{% if (messages | length) == 100000 and messages[1:] | length == 99999 and "
      "(messages | reverse | first).content == m.content and messages[::-1][0].role in messages[2:][-1].role %}."
      "{% endif %}{% endfor %}",
      messages);
  CHECK(text == std::string(100'000, '.'));
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(60));  // quadratic: many minutes
}

TEST_CASE("slices of slices and of lists that go backwards") {
  CHECK(rendered("{{ (range(10) | list)[2:8][1:4] | join(',') }}") == "3,4,5");
  CHECK(rendered("{{ range(10)[::-1][::3] | join(',') }}") == "9,6,3,0");
  CHECK(rendered("{{ range(10)[8:2:-2][::-1] | join(',') }}") == "4,6,8");
  CHECK(rendered("{{ range(10)[::-3] | reverse | join(',') }}") == "0,3,6,9");
  CHECK(rendered("{{ range(3)[5:] | length }}{{ range(3)[2:1] | length }}{{ range(3)[-9:9] | join }}") == "00012");
  CHECK(rendered("{{ 'h\u00e9llo'[::-2] }}{{ range(4)[1:] + range(9)[:2] == [1, 2, 3, 0, 1] }}") == "olhTrue");
}

TEST_CASE("nothing in a template exhausts the stack or overflows a number") {
  const auto refused = [](const std::string& source) {
    CHECK_THROWS_WITH_AS(rendered(source), doctest::Contains("is not rendered here"), Error);
  };
  refused("{% set n = namespace(x=[]) %}{% for i in range(90000) %}{% set n.x = [n.x] %}{% endfor %}");
  refused("{% set n = namespace(x={}) %}{% for i in range(90000) %}{% set n.x = {'a': n.x} %}{% endfor %}");
  CHECK(rendered("{% set n = namespace(x=1) %}{% set m = namespace(n=n) %}{% set n.x = [m, n] %}{{ n.x | length }}") == "2");
  const std::string most = "999999999 * 999999999 * 9";  // 8999999982000000009
  refused("{{ -(-" + most + " - " + most + ") }}");
  refused("{% set low = -" + most + " - 223372054854775799 %}{{ -low }}");
  CHECK(rendered("{% set low = -" + most + " - 223372054854775799 %}{{ range(9)[:: low] | join }}{{ low }}") ==
        "8-9223372036854775808");
  CHECK(rendered("{{ range(" + most + " + 223372054854775700, " + most + " + 223372054854775797, 90) | length }}") == "2");
}
