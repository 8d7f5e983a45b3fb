"""Chat templates and tokenizers similar to those of six model families."""

from __future__ import annotations

import json

import others

CHATML = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' -%}
        {{- BEGIN message['content'] + '<|im_end|>' END -}}
    {%- else -%}
        {{- message['content'] + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' -%}
        {{- BEGIN message['content'] | trim + '<|eot_id|>' END -}}
    {%- else -%}
        {{- message['content'] | trim + '<|eot_id|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

MISTRAL = """\
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] + '\\n\\n' -%}{%- set messages = messages[1:] -%}
{%- else -%}
    {%- set system = '' -%}
{%- endif -%}
{{- bos_token }}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- '[INST] ' + (system if loop.last or loop.index0 == messages | length - 2 else '') }}
        {{- message['content'] + ' [/INST]' -}}
    {%- else -%}
        {{- BEGIN ' ' + message['content'] | trim + eos_token END -}}
    {%- endif -%}
{%- endfor -%}
"""

GEMMA = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {{- raise_exception('System role not supported') -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '<start_of_turn>model\\n' }}{{- BEGIN message['content'] | trim + '<end_of_turn>' END -}}{{ '\\n' -}}
    {%- else -%}
        {{- '<start_of_turn>' + message['role'] + '\\n' + message['content'] | trim + '<end_of_turn>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

PLAIN = """\
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '### Answer: ' }}{{- BEGIN message['content'] | trim + (eos_token if loop.last else '') END -}}
        {{- '\\n\\n' -}}
    {%- else -%}
        {{- '### ' + message['role'] | capitalize + ': ' + message['content'] | trim + '\\n\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Answer: ' -}}{%- endif -%}
"""
"""Template that trims white space, and writes an end mark only after the last turn."""

REASONING = """\
{%- if tools -%}
    {{- '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') }}
    {{- '# Tools' -}}
    {%- for tool in tools -%}{{- '\\n' + tool | tojson -}}{%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- elif messages[0].role == 'system' -%}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- set ns = namespace(searching=true, last_question=messages | length - 1) -%}
{%- for message in messages[::-1] -%}
    {%- if ns.searching and message.role == 'user' and not (message.content.startswith('<tool_response>')
            and message.content.endswith('</tool_response>')) -%}
        {%- set ns.searching = false -%}{%- set ns.last_question = messages | length - 1 - loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else '' -%}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' -}}
    {%- elif message.role == 'assistant' -%}
        {%- set reasoning = '' -%}
        {%- if message.reasoning_content is string -%}
            {%- set reasoning = message.reasoning_content -%}
        {%- elif '</think>' in content -%}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
        {%- endif -%}
        {{- '<|im_start|>assistant\\n' -}}
        BEGIN_BLOCK
        {%- if loop.index0 > ns.last_question and (loop.last or reasoning) -%}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') -}}
        {%- else -%}
            {{- content -}}
        {%- endif -%}
        {%- for call in message.tool_calls or [] -%}
            {%- if content or not loop.first -%}{{- '\\n' -}}{%- endif -%}
            {%- set call = call.function or call -%}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- (call.arguments if call.arguments is string else call.arguments | tojson) + '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>' -}}
        END_BLOCK
        {{- '\\n' -}}
    {%- elif message.role == 'tool' -%}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' -}}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""
"""Template similar to Qwen 3's: reasoning only in the last turn, tools, tool responses within a user's turn."""

TEMPLATES = {
    "chatml": ("chat", [], CHATML),
    "llama3": ("llama3", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], LLAMA3),
    "mistral": ("llama2", [], MISTRAL),
    "gemma": ("llama2", ["<start_of_turn>", "<end_of_turn>"], GEMMA),
    "plain": ("gpt2", [], PLAIN),
    "reasoning": ("qwen", [], REASONING),
}
"""By family: the kind of tokenizer in tests/others.py, its added tokens, and the template."""


def template_of(name: str, *, marks: bool) -> str:
    """Return a template, with or without `{% generation %}` marks."""
    text = TEMPLATES[name][2]
    for word, old, new in (
        ("BEGIN", "{{- BEGIN ", "{%- generation -%}{{- "),
        ("END", " END -}}", " -}}{%- endgeneration -%}"),
    ):
        text = text.replace(old, new if marks else old.replace(f"{word} ", "").replace(f" {word}", ""))
    text = text.replace("BEGIN_BLOCK", "{%- generation -%}" if marks else "")
    return text.replace("END_BLOCK", "{%- endgeneration -%}" if marks else "")


def make_chat_folder(name, folder, *, marks=False):
    """Write the tokenizer of a family with its template into a folder."""
    kind, added, _ = TEMPLATES[name]
    tokenizer, settings, _ = getattr(others, f"make_{kind}")()
    tokenizer.add_special_tokens(added)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {**settings, "chat_template": template_of(name, marks=marks)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
