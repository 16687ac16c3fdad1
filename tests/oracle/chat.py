"""Renders chat templates over conversations with transformers and writes tests/it/chat.json for tests/it/chat.rs.

    python tests/oracle/chat.py

The templates are our own: short ones in the manner of the common families, with the constructs that those use.
"""

import json
from pathlib import Path

import jinja2
import transformers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]

TEMPLATES = {
    # ChatML, with a system message of its own where none is given.
    "chatml": """\
{%- if messages[0]['role'] == 'system' -%}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else -%}
    {{- '<|im_start|>system\\nYou answer in few words.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>' ~ '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
""",
    # Headers around each role, contents trimmed, BOS before the first.
    "headers": """\
{% set loop_messages = messages %}
{% for message in loop_messages %}
{% set content = '<|head|>' + message['role'] + '<|body|>\\n\\n' + message['content'] | trim + '<|over|>' %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
{{ content }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|head|>assistant<|body|>\\n\\n' }}
{%- else %}{{ eos_token }}
{%- endif %}""",
    # Strict turns; the system message goes into the first user message.
    "inst": """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate: user, assistant, user; message ' ~ loop.index ~ ' is ' ~ message.role) }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- '[INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content'].strip() + eos_token }}
    {%- endif %}
{%- endfor %}
""",
    # Roles by other names, contents trimmed, no system role.
    "turns": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
        "{% else %}{% set role = message['role'] %}{% endif %}{{ '<turn>' + role + '\\n' + message['content'] | trim"
        " + '</turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{'<turn>model\\n'}}{% endif %}"
    ),
    # One line for each role.
    "tags": """\
{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] in ['assistant', 'model'] %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}""",
    # Macros, namespaces, reasoning cut out of earlier answers, tools and documents that are none.
    "reasoning": """\
{%- macro section(title, body='', last=false) -%}
<{{ title }}>{{ body }}</{{ title }}>{{ '' if last else '\\n' }}
{%- endmacro -%}
{%- set ns = namespace(found=false, last=messages|length - 1, roles=[]) -%}
{%- for message in messages[::-1] -%}
    {%- set index = (messages|length - 1) - loop.index0 -%}
    {%- if not ns.found and message.role == 'user' -%}
        {%- set ns.found = true -%}
        {%- set ns.last = index -%}
    {%- endif -%}
    {%- set ns.roles = ns.roles + [message.role] -%}
{%- endfor -%}
{%- if tools -%}{{ section('tools', tools | tojson) }}{%- endif -%}
{%- if documents is defined and documents is not none -%}{{ section('documents') }}{%- endif -%}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else '' -%}
    {%- if message.role == 'assistant' and '</think>' in content and loop.index0 < ns.last -%}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {%- if message.reasoning_content is defined -%}{{ message.reasoning_content }}{%- endif -%}
    {{- section(message.role | upper, content, last=loop.last) -}}
{%- endfor -%}
{{ ' [' ~ ns.roles | join(',') ~ '] ' ~ ns.last }}
{%- if add_generation_prompt is defined and add_generation_prompt %}

<ASSISTANT>
{%- endif -%}
""",
    # Python's methods, tests and JSON.
    "python": """\
{%- for m in messages %}
{{ loop.index0 }}/{{ loop.length }} {{ m | tojson }} {{ [m.content, 1, 2.5, none, true, {'b': [], 'a': {}}] | tojson }}
{{ m.content | tojson(ensure_ascii=True) }} {{ {'z': m.role, 'a': 'é'} | tojson(indent=2) }}
{{ {'z': [1, 2], 'a': 3} | tojson(sort_keys=True, separators=(',', ':')) }} {{ {} | tojson(indent=4) }}
{{ m.content.strip() }}|{{ m.content.rstrip() }}|{{ m.content.lstrip('\\n "') }}|{{ m.content.split() | length }}
{{ m.content.upper() }}|{{ m.content.replace('a', '<&>') }}|{{ m['role'].title() }}|{{ m.role.capitalize() }}
{{ m.content.startswith('Wh') }} {{ m.content.endswith(('.', '?')) }} {{ m.get('name', 'nobody') }} {{ m.get('x') is none }}
{% for key, value in m.items() %}{{ key }}={{ value | length }}{{ ';' if not loop.last }}{% endfor +%}
{{ 'content' in m }} {{ 'name' not in m }} {{ m.role is string }} {{ m is mapping }} {{ m is iterable }} {{ m.role is sequence }}
{{ m.content is sequence }} {{ none is iterable }} {{ messages is sequence }} {{ m.content[:3] }}|{{ m.content[-2:] }}|{{ m.role[::-1] }}
{{ m.missing }}{{ m.missing is defined }} {{ nowhere is undefined }} {{ m.missing | default('else') }} {{ none }} {{ true }} {{ 7 // 2 }} {{ 7 / 2 }}
{{ m.role.removeprefix('us') }} {{ m.role ~ 1 ~ none }} {{ (m.content ~ '') | replace('\\n', '\\\\n') }}
{%- endfor %}
{%- set rest = messages[1:] %}{% set dialog = [messages[0]] + rest %}
{{ rest | length }} {{ rest is sequence }} {{ rest[0].role if rest }} {{ rest[-1].role if rest }} {{ rest | tojson }}
{{ dialog[-1].content == messages[-1].content }} {{ dialog | length }} {{ (dialog | last).role }} {{ dialog == messages }}
{{ messages[:-1] | length }} {{ rest[1:] | length }} {{ messages[1].role if messages | length > 1 }} {{ not rest }}
{{ messages | map(attribute='role') | join(' ') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ messages | rejectattr('role', 'equalto', 'user') | map(attribute='content') | list | tojson }} {{ messages[-1].role }} {{ messages | first | length }}
""",
    # What white space and control tags do.
    "blocks": """\
  {# A comment on a line of its own. #}
\t{% if true %}
  kept
    {%+ if true %}also kept{% endif %}
  {%- endif %}

{% for message in messages -%}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% if loop.index > 3 %}{% break %}{% endif %}
    {% generation %}
    {{ message.content }}
    {% endgeneration %}
    {%- set text %}
  [{{ message.role }}]
    {% endset %}
{{ text }}{%- generation -%} x {%- endgeneration -%}
{% else %}
nobody
{% endfor %}
{% filter upper %}loud {{ messages[0].role }}{% endfilter %}

{% raw %}{{ raw }} {% if %}{% endraw %}
{{- "a\\tb\\\\ \\"q\\" \\u00e9" }} {{ 'it''s' }}
{% with a = 1, b = a %}{{ a }}{% endwith %}
{{ '%s-%s' | format('x', 2) }} {{ '{%' }} {{ '{% if %}' }}

""",
}

CONVERSATIONS = {
    "one": [("user", "What is it?")],
    "system": [("system", "Be kind."), ("user", "Hello.")],
    "turns": [
        ("system", "  Padded system  "),
        ("user", "First"),
        ("assistant", "<think>\nlong\n</think>\n\nSecond  "),
        ("user", "\n Third\t"),
    ],
    "answered": [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", " d\n")],
    "unicode": [("user", "Größe 🦀 日本語 \u00a0e\u0301\u2028 \u200b"), ("assistant", "ñ\u3000")],
    "quotes": [("user", "\"a\" 'b' \\n \\ <b>&amp;</b> {{ 1 }}{% if %}{# x #} \r\n\ttab \x08\x1f\x7f/ <s></s>")],
    "newlines": [("user", "\n\none\n\n\ntwo\n"), ("assistant", "\n"), ("user", "   ")],
    "empty": [("system", ""), ("user", "")],
    "two users": [("user", "a"), ("user", "b")],
    "other roles": [("user", "call"), ("assistant", ""), ("tool", '{"r": [1, 2.0]}')],
}


def main():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(ROOT / "models/demo/tokenizer.json"), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    conversations = {
        name: [{"role": role, "content": content} for role, content in turns] for name, turns in CONVERSATIONS.items()
    }
    cases = []
    for template, source in TEMPLATES.items():
        for conversation, messages in conversations.items():
            for prompted in [True, False]:
                case = {"template": template, "conversation": conversation, "add_generation_prompt": prompted}
                asked = {"chat_template": source, "add_generation_prompt": prompted}
                try:
                    case["text"] = tokenizer.apply_chat_template(messages, tokenize=False, **asked)
                    if template in ["chatml", "headers"] and prompted:
                        case["ids"] = tokenizer.apply_chat_template(messages, return_dict=False, **asked)
                except jinja2.exceptions.TemplateError as e:
                    case["error"] = str(e)
                cases.append(case)
    made_by = {"transformers": transformers.__version__, "jinja2": jinja2.__version__}
    out = {"made_by": made_by, "templates": TEMPLATES, "conversations": conversations}
    lines = ",\n".join(json.dumps(case) for case in cases)
    text = json.dumps(out, indent=1)[:-2] + f',\n "cases": [\n{lines}\n]\n}}\n'
    json.loads(text)
    (ROOT / "tests/it/chat.json").write_text(text)
    print(f"{len(cases)} cases, {sum('error' in case for case in cases)} of them errors, {len(text)} bytes")


main()
