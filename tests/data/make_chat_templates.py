"""Make chat_templates.json: what the transformers library writes for a table of chat templates and conversations.

Command:   python tests/data/make_chat_templates.py      (needs transformers and jinja2, which the tests do not)
Origin:    transformers 5.24, jinja2 3.1.6. The templates are written for this file, in the styles of the models that
           they are named after; the texts are those of ``apply_chat_template(tokenize=False)``, null where that raises.
"""
# ruff: noqa: E501

import json
from pathlib import Path

CONVERSATIONS = {
    "question": [("user", "What is a fable?")],
    "turns": [("user", "1+1?"), ("assistant", "2"), ("user", " And 2+2? "), ("assistant", "  4, sir.\n")],
    "system": [("system", "Be short.\n\n"), ("user", "Hi"), ("assistant", 'Hello <b>"you"</b> é 漢'), ("user", "Bye")],
    "tool": [
        ("user", "Weather?"),
        ("assistant", '{"name": "rain"}'),
        ("tool", "[1, 2]"),
        ("tool", "no"),
        ("assistant", "Dry."),
    ],
    "thoughts": [
        ("user", "a"),
        ("assistant", "<think>\nhm\n</think>\n\nb"),
        ("user", "c"),
        ("assistant", "<think>x</think>d"),
    ],
    "out of turn": [("user", "a"), ("user", "b")],
    "empty": [("user", ""), ("assistant", "")],
}
CHATML = """{% for message in messages %}
{% if loop.first and message.role != 'system' %}
{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
GENERATION = """{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = '26 Jul 2024' %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date_string + '\\n\\n' + system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {%- set role = 'ipython' if message.role == 'tool' else message.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if message.role == 'tool' %}{{ message.content | tojson }}{% else %}{{ message['content'] | trim }}{% endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('roles must alternate user/assistant') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""
MISTRAL = """{%- set ns = namespace(system='') -%}
{%- if messages[0].role == 'system' -%}{%- set ns.system = messages[0].content ~ '\\n\\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set rest = messages -%}{%- endif -%}
{{- bos_token }}
{%- for message in rest %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' }}{% if loop.last or loop.index0 == rest | length - 2 %}{{ ns.system }}{% endif %}{{ message.content }}{{ ' [/INST]' }}
    {%- elif message.role == 'tool' %}
        {%- if message.content == 'no' %}{% continue %}{% endif %}
        {{- '[TOOL_RESULTS] ' ~ message.content | tojson(indent=1) ~ '[/TOOL_RESULTS]' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' ~ message.content ~ eos_token }}
    {%- endif %}
{%- endfor %}"""
QWEN = """{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages | length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = messages | length - 1 - loop.index0 %}
    {%- if ns.searching and message.role == 'user' %}{% set ns.searching = false %}{% set ns.last = index %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
        {{- content + '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
DEEPSEEK = """{{ bos_token }}{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<|User|>' + message.content }}
{%- elif message.role == 'assistant' %}{{ '<|Assistant|>' + message.content.split('</think>')[-1] + eos_token }}
{%- elif message.role == 'system' %}{{ message.content }}{% break %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"""
MACROS = """{% macro turn(message, mark='#') %}{{ mark }} {{ message.role | capitalize | replace('User', 'Human') }}: {{ message.content | default('-', true) | trim }}
{% endmacro %}
{% for message in messages | rejectattr('role', 'equalto', 'tool') %}
    {# a comment #}
    {{ turn(message, mark='##' if loop.first else '#') }}
{% endfor %}
{{ messages | selectattr('role', 'in', ['user', 'tool']) | map(attribute='content') | join('/') | upper }}
{{ [1, 2.5, none, true, {'b': 1, 'a': ['<', '&']}] | tojson(sort_keys=true, separators=(',', ':')) }}
{{ pad_token is defined }} {{ tools is none }} {{ '%s' | format(messages | length) }}
{% if add_generation_prompt %}# Assistant:{% endif %}"""
TEMPLATES = {
    "chatml": CHATML,
    "generation": GENERATION,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "qwen": QWEN,
    "zephyr": ZEPHYR,
    "deepseek": DEEPSEEK,
    "macros": MACROS,
}


def main() -> None:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    texts = {}
    for template_name, template in TEMPLATES.items():
        for name, conversation in CONVERSATIONS.items():
            messages = [{"role": role, "content": content} for role, content in conversation]
            for opens_answer in (False, True):
                try:
                    text = tokenizer.apply_chat_template(
                        messages, chat_template=template, tokenize=False, add_generation_prompt=opens_answer
                    )
                except Exception:  # a template that refuses
                    text = None
                texts[f"{template_name}/{name}/{int(opens_answer)}"] = text
    content = {"templates": TEMPLATES, "conversations": CONVERSATIONS, "texts": texts}
    Path(__file__).with_name("chat_templates.json").write_text(
        json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
