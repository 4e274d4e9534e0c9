"""Chat templates in the styles of published model families, each written for these tests from what the family does.

None is a copy. Each does what its family's template is known for: its marks, white space, default system message, date,
where it puts a system message and tools, what it refuses, and what it rewrites once more turns follow.

PYTHONPATH=. python tests/chat_styles.py writes the table of docs/boundary.md.
"""

# ruff: noqa: E501
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from chat_templates import CHATML, build, make_tokenizer, talk, trained_texts
from tokenizers import AddedToken

from apiary.core.errors import UserError
from apiary.data import tokenization
from apiary.data.examples import Example
from apiary.data.turns import ToolCall, Turn

BAR = "\uff5c"  # DeepSeek's full-width bar
ALTERNATE = (  # roles must alternate, after a system message
    "{% set talk = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% for m in talk %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/...') }}{% endif %}{% endfor %}"
)
LAST_ASKED = "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"

LLAMA2 = ALTERNATE + (
    "{% for m in talk %}{% if m.role == 'user' %}"
    "{% if loop.first and messages[0].role == 'system' %}"
    "{% set said = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' + m.content %}"
    "{% else %}{% set said = m.content %}{% endif %}"
    "{{ bos_token + '[INST] ' + said.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA31 = (
    "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{% set first = messages[0].content | trim if messages[0].role == 'system' else '' %}"
    "{% set talk = messages[1:] if messages[0].role == 'system' else messages %}"
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{% if tools %}{{ 'Environment: ipython\n' }}{% endif %}"
    "{{ 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' + first + '<|eot_id|>' }}"
    "{% for m in talk %}"
    "{% if m.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + (m.content | tojson) + '<|eot_id|>' }}"
    "{% elif m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{{ '{\"name\": \"' + call.name + '\", \"parameters\": ' + (call.arguments | tojson) + '}<|eot_id|>' }}"
    "{% else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if loop.first and tools %}{{ 'Given the following functions, please respond with a JSON for a call.\n\n' }}"
    "{% for t in tools %}{{ (t | tojson(indent=4)) + '\n\n' }}{% endfor %}{% endif %}"
    "{{ (m.content | trim) + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_MISTRAL_TALK = (  # system message and tools stand before the last question; ids have nine characters
    "{% set ns = namespace(n=0, last=-1) %}{% for m in talk %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}"
    "{% if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}"
    "{% if (m.role == 'user') != (ns.n % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/...') }}{% endif %}{% set ns.n = ns.n + 1 %}"
    "{% endif %}{% endfor %}{{ bos_token }}"
)
_MISTRAL_CALLS = (
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS]SP[' }}{% for c in m.tool_calls %}"
    "{% if c.id is not defined or c.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    '{{ \'{"name": "\' + c.function.name + \'", "arguments": \' + (c.function.arguments | tojson) }}'
    "{{ ', \"id\": \"' + c.id + '\"}' + (', ' if not loop.last else ']' + eos_token) }}{% endfor %}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]SP{\"content\": ' + m.content + ', \"call_id\": \"' }}"
    "{{ m.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
)
MISTRAL3 = (
    "{% set system = messages[0].content if messages[0].role == 'system' else none %}"
    "{% set talk = messages[1:] if system is not none else messages %}" + _MISTRAL_TALK + "{% for m in talk %}"
    "{% if m.role == 'user' %}{% if tools and loop.index0 == ns.last %}"
    "{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{% if loop.last and system is not none %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
    + _MISTRAL_CALLS.replace("SP", " ")
    + "{% else %}{{ ' ' + (m.content | trim) + eos_token }}{% endif %}{% endfor %}"
)
TEKKEN = (  # Mistral Small: a system block of its own, with a date where there is no system message
    "{% set today = strftime_now('%Y-%m-%d') %}"
    "{% set system = messages[0].content if messages[0].role == 'system' else 'The current date is ' + today + '.' %}"
    "{% set talk = messages[1:] if messages[0].role == 'system' else messages %}"
    + _MISTRAL_TALK
    + "{{ '[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' }}{% for m in talk %}"
    "{% if m.role == 'user' %}{% if tools and loop.index0 == ns.last %}"
    "{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST]' + m.content + '[/INST]' }}"
    + _MISTRAL_CALLS.replace("SP", "")
    + "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
_HERMES_TOOLS = (
    "{% if tools %}{{ '\n\n# Tools\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}"
    "{% for t in tools %}{{ '\n' + (t | tojson) }}{% endfor %}{{ '\n</tools>\n\nReturn calls within <tool_call></tool_call> XML tags.' }}{% endif %}"
)
_HERMES_CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first }}"
    "{{ '<tool_call>\n{\"name\": \"' + c.function.name + '\", \"arguments\": ' + (c.function.arguments | tojson) + '}\n</tool_call>' }}{% endfor %}"
)
_HERMES_RESULTS = (  # results of one turn stand together in one of the user's
    "{% elif m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "{{ '<|im_start|>user' }}{% endif %}{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
)
QWEN25 = (
    "{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content }}"
    "{% else %}{{ 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}{% endif %}"
    + _HERMES_TOOLS
    + "{{ '<|im_end|>\n' }}{% for m in messages %}"
    "{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' + (m.content or '') }}"
    + _HERMES_CALLS
    + "{{ '<|im_end|>\n' }}"
    + _HERMES_RESULTS
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = LAST_ASKED + (
    "{% if tools or messages[0].role == 'system' %}{{ '<|im_start|>system\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    + _HERMES_TOOLS
    + "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{% set content = m.content or '' %}{% set thought = m.reasoning_content or '' %}"
    "{% if not thought and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{% else %}{{ content }}{% endif %}"
    + _HERMES_CALLS
    + "{{ '<|im_end|>\n' }}"
    + _HERMES_RESULTS
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + ALTERNATE + "{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ (m.content | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% set lead = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    + ALTERNATE
    + "{% for m in talk %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ (lead if loop.first else '') + (m.content | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}{% for m in messages %}"
    f"{{% if m.role == 'user' %}}{{{{ '<{BAR}User{BAR}>' + m.content }}}}"
    f"{{% elif m.role == 'assistant' %}}{{{{ '<{BAR}Assistant{BAR}>' + m.content + '<{BAR}end{BAR}>' }}}}"
    "{% endif %}{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '<{BAR}Assistant{BAR}>' }}}}{{% endif %}}"
)
DEEPSEEK_R1 = DEEPSEEK.replace("+ m.content + '<\uff5cend", "+ m.content.split('</think>')[-1] + '<\uff5cend").replace(
    "Assistant\uff5c>' }}{% endif %}", "Assistant\uff5c><think>\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    + CHATML
)
SMOLLM3 = (  # the reasoning mode stands in the system message, the block of an answer without thinking is empty
    "{% set mode = '/think' if enable_thinking else '/no_think' %}"
    "{% set own = messages[0].content if messages[0].role == 'system' else 'You are a helpful AI assistant named SmolLM.' %}"
    "{{ '<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: ' }}"
    "{{ strftime_now('%d %B %Y') + '\nReasoning Mode: ' + mode + '\n\n## Custom Instructions\n\n' + own + '\n\n' }}"
    "{% if tools %}{{ '### Tools\n\n' }}{% for t in tools %}{{ (t | tojson) + '\n' }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% elif m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' + ('<think>\n\n</think>\n' if mode == '/no_think' else '') + m.content.lstrip('\n') }}"
    "{{ '<|im_end|>\n' }}{% elif m.role == 'tool' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if mode == '/no_think' %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}"
)
GRANITE = (
    "{% set own = 'Knowledge Cutoff Date: April 2024.\nToday\\'s Date: ' + strftime_now('%B %d, %Y') + '.\nYou are Granite, developed by IBM.' %}"
    "{% if messages[0].role == 'system' %}{% set own = messages[0].content %}{% endif %}"
    "{{ '<|start_of_role|>system<|end_of_role|>' + own + '<|end_of_text|>\n' }}"
    "{% if tools %}{{ '<|start_of_role|>tools<|end_of_role|>' + (tools | tojson(indent=4)) + '<|end_of_text|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}"
    "{{ '<|start_of_role|>assistant<|end_of_role|><|tool_call|>[' }}{% for c in m.tool_calls %}"
    "{{ '{\"name\": \"' + c.function.name + '\", \"arguments\": ' + (c.function.arguments | tojson) + '}' }}"
    "{{ ', ' if not loop.last }}{% endfor %}{{ ']<|end_of_text|>\n' }}"
    "{% elif m.role == 'tool' %}{{ '<|start_of_role|>tool_response<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}"
    "{% elif m.role != 'system' or not loop.first %}"
    "{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role != 'assistant' %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}"
    "{% else %}{{ '<|assistant|>\n' + m.content + eos_token + ('\n' if not loop.last else '') }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
_COHERE = "<|START_OF_TURN_TOKEN|><|{}_TOKEN|>"
COMMAND_R = (
    "{{ bos_token }}"
    + ALTERNATE
    + "{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|><|' + {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}[m.role] }}"
    "{{ '_TOKEN|>' + m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
FALCON = (  # plain words, and nothing ends an answer
    "{% for m in messages %}{{ '\n' if not loop.first }}"
    "{{ {'system': 'System', 'user': 'User', 'assistant': 'Falcon'}[m.role] + ': ' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nFalcon:' }}{% endif %}"
)
VICUNA = ALTERNATE + (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content + ' ' }}"
    "{% else %}{{ 'A chat between a curious user and an artificial intelligence assistant. ' }}{% endif %}"
    "{% for m in talk %}{% if m.role == 'user' %}{{ 'USER: ' + m.content.strip() + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content.strip() + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
HARMONY = (  # channels; the last answer ends with another mark than earlier ones, whose thinking is dropped
    "{{ '<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n' }}"
    "{{ 'Current date: ' + strftime_now('%Y-%m-%d') + '\n\nReasoning: medium\n\n' }}"
    "{{ '# Valid channels: analysis, commentary, final.<|end|>' }}"
    "{% set developer = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set talk = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% if developer or tools %}{{ '<|start|>developer<|message|>' }}"
    "{% if developer %}{{ '# Instructions\n\n' + developer + '\n\n' }}{% endif %}"
    "{% if tools %}{{ '# Tools\n\nnamespace functions {\n\n' }}{% for t in tools %}"
    "{{ '// ' + t.function.description + '\ntype ' + t.function.name + ' = (_: ' }}"
    "{{ (t.function.parameters.properties | default({}) | list | join(', ')) + ') => any;\n\n' }}{% endfor %}"
    "{{ '} // namespace functions' }}{% endif %}{{ '<|end|>' }}{% endif %}"
    "{% set ns = namespace(called='') %}{% for m in talk %}"
    "{% if m.role == 'assistant' and m.tool_calls %}{% set call = m.tool_calls[0].function %}"
    "{% set ns.called = call.name %}"
    "{% if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}"
    "{{ (call.arguments | tojson) + '<|call|>' }}"
    "{% elif m.role == 'assistant' and loop.last and not add_generation_prompt %}"
    "{% if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{% elif m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|start|>functions.' + ns.called + ' to=assistant<|channel|>commentary<|message|>' }}"
    "{{ (m.content | tojson) + '<|end|>' }}"
    "{% else %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)


class Style(NamedTuple):
    """A family's way with conversations.

    written: the conversation Hi, Yo., And?, Bye. as it stands when encoded, worked out by hand, with trained text in
    double angle brackets; "" where it is refused. does: its habits, in words.
    """

    template: str
    marks: str
    written: str
    does: str


_QWEN25 = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
_SMOLLM2 = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n"
_SMOLLM3 = (
    "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: 26 July 2024\n"
    "Reasoning Mode: /no_think\n\n## Custom Instructions\n\nYou are a helpful AI assistant named SmolLM.\n\n<|im_end|>\n"
)
_GRANITE = (
    "<|start_of_role|>system<|end_of_role|>Knowledge Cutoff Date: April 2024.\nToday's Date: July 26, 2024.\n"
    "You are Granite, developed by IBM.<|end_of_text|>\n"
)
_HARMONY = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: 2024-07-26\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, final.<|end|>"
)
_LLAMA31 = (
    "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    "<|eot_id|>"
)


def _exchanges(user: str, assistant: str, end: str, after: str = "", close: str = "") -> str:
    """Hi, Yo., And?, Bye. where each turn is a header, the text and an end; both answers trained."""
    lines = [
        f"{user}{asked}{close}{assistant}\u27ea{said}{end}\u27eb{after}"
        for asked, said in (("Hi", "Yo."), ("And?", "Bye."))
    ]
    return "".join(lines).removesuffix(after) if after else "".join(lines)


def _chatml(last: str = "", **more: str) -> str:
    return _exchanges(
        "<|im_start|>user\n", "<|im_start|>assistant\n" + last, "<|im_end|>", "\n", "<|im_end|>\n", **more
    )


STYLES: dict[str, Style] = {
    "Llama 2": Style(
        LLAMA2,
        "",
        "<s>[INST] Hi [/INST]\u27ea Yo. </s>\u27eb<s>[INST] And? [/INST]\u27ea Bye. </s>\u27eb",
        "folds the system message into the first question, demands alternation",
    ),
    "Llama 3.1": Style(
        LLAMA31,
        "",
        _LLAMA31
        + _exchanges(
            "<|start_header_id|>user<|end_header_id|>\n\n",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|eot_id|>",
            "",
            "<|eot_id|>",
        ),
        "writes a date; tools stand in the first question; one call a turn",
    ),
    "Mistral v0.3": Style(
        MISTRAL3,
        "[AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]",
        "<s>[INST] Hi[/INST]\u27ea Yo.</s>\u27eb[INST] And?[/INST]\u27ea Bye.</s>\u27eb",
        "puts system message and tools before the last question, demands alternation and ids of nine letters",
    ),
    "Mistral Tekken": Style(
        TEKKEN,
        "[AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]",
        "<s>[SYSTEM_PROMPT]The current date is 2024-07-26.[/SYSTEM_PROMPT]"
        "[INST]Hi[/INST]\u27eaYo.</s>\u27eb[INST]And?[/INST]\u27eaBye.</s>\u27eb",
        "writes a date where there is no system message; tools as Mistral v0.3, demands alternation",
    ),
    "Qwen 2.5": Style(
        QWEN25, "<tool_call> </tool_call>", _QWEN25 + _chatml(), "has a system message of its own; Hermes tools"
    ),
    "Qwen 3": Style(
        QWEN3,
        "<tool_call> </tool_call> <think> </think>",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n\u27eaYo.<|im_end|>\u27eb\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n\u27eaBye.<|im_end|>\u27eb",
        "drops earlier thinking; an empty block before an answer without, which goes once more turns follow",
    ),
    "Gemma 2": Style(
        GEMMA2,
        "",
        "<s>" + _exchanges("<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>", "\n", "<end_of_turn>\n"),
        "refuses a system message, demands alternation",
    ),
    "Gemma 3": Style(
        GEMMA3,
        "",
        "<s>" + _exchanges("<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>", "\n", "<end_of_turn>\n"),
        "folds the system message into the first question, demands alternation",
    ),
    "Phi-3": Style(
        PHI3,
        "<|user|> <|assistant|> <|system|> <|end|>",
        _exchanges("<|user|>\n", "<|assistant|>\n", "<|end|>", "\n", "<|end|>\n"),
        "ends a finished conversation with EOS, after the end of the turn",
    ),
    "Phi-4": Style(
        PHI4,
        "<|im_sep|>",
        _exchanges("<|im_start|>user<|im_sep|>", "<|im_start|>assistant<|im_sep|>", "<|im_end|>", "", "<|im_end|>"),
        "no white space around turns",
    ),
    "ChatML": Style(CHATML, "", _chatml(), "any role, as it is given"),
    "Zephyr": Style(
        ZEPHYR,
        "<|user|> <|assistant|> <|system|>",
        _exchanges("<|user|>\n", "<|assistant|>\n", "</s>", "\n", "</s>\n"),
        "ends every turn with EOS",
    ),
    "DeepSeek V3": Style(
        DEEPSEEK,
        f"<{BAR}User{BAR}> <{BAR}Assistant{BAR}> <{BAR}end{BAR}>",
        "<s>" + _exchanges(f"<{BAR}User{BAR}>", f"<{BAR}Assistant{BAR}>", f"<{BAR}end{BAR}>"),
        "a bare system message before the first turn",
    ),
    "DeepSeek R1": Style(
        DEEPSEEK_R1,
        f"<{BAR}User{BAR}> <{BAR}Assistant{BAR}> <{BAR}end{BAR}> <think> </think>",
        "",
        "opens thinking in its generation prompt, and writes answers without",
    ),
    "SmolLM2": Style(SMOLLM2, "", _SMOLLM2 + _chatml(), "has a system message of its own"),
    "SmolLM3": Style(
        SMOLLM3,
        "<think> </think>",
        _SMOLLM3 + _chatml("<think>\n\n</think>\n"),
        "writes a date, the reasoning mode in the system message, and an empty block before every answer",
    ),
    "Granite": Style(
        GRANITE,
        "<|start_of_role|> <|end_of_role|> <|end_of_text|> <|tool_call|>",
        _GRANITE
        + _exchanges(
            "<|start_of_role|>user<|end_of_role|>",
            "<|start_of_role|>assistant<|end_of_role|>",
            "<|end_of_text|>",
            "\n",
            "<|end_of_text|>\n",
        ),
        "writes a date in a system message of its own; tools in a turn of their own",
    ),
    "OLMo 2": Style(
        OLMO2,
        "<|user|> <|assistant|> <|system|>",
        "<s>" + _exchanges("<|user|>\n", "<|assistant|>\n", "</s>", "\n", "\n"),
        "a line break after an answer only where a turn follows",
    ),
    "Command R": Style(
        COMMAND_R,
        "<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|>",
        "<s>"
        + _exchanges(
            _COHERE.format("USER"), _COHERE.format("CHATBOT"), "<|END_OF_TURN_TOKEN|>", "", "<|END_OF_TURN_TOKEN|>"
        ),
        "builds its marks from the role, demands alternation",
    ),
    "Falcon": Style(
        FALCON,
        "",
        "User: Hi\nFalcon:\u27ea Yo.</s>\u27eb\nUser: And?\nFalcon:\u27ea Bye.</s>\u27eb",
        "plain words, and no end of an answer: EOS is added",
    ),
    "Vicuna": Style(
        VICUNA,
        "",
        "<s>A chat between a curious user and an artificial intelligence assistant. "
        "USER: Hi ASSISTANT:\u27ea Yo.</s>\u27ebUSER: And? ASSISTANT:\u27ea Bye.</s>\u27eb",
        "plain words, a system message of its own, demands alternation",
    ),
    "GPT-OSS (harmony)": Style(
        HARMONY,
        "<|start|> <|end|> <|message|> <|channel|> <|return|> <|call|>",
        _HARMONY + "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Yo.<|end|>"
        "<|start|>user<|message|>And?<|end|><|start|>assistant<|channel|>final<|message|>\u27eaBye.<|return|>\u27eb",
        "writes a date; channels; the last answer ends with another mark than earlier ones; drops earlier thinking",
    ),
}


def tokenizer_of(style: Style) -> Any:
    """A small tokenizer that has the style's marks as control tokens."""
    tokenizer = make_tokenizer(style.template)
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in style.marks.split()])
    return tokenizer


# --- what becomes of conversations of a few kinds

_TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "Says it",
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
            },
        }
    ]
)


def _talk(*turns: Turn, tools: str = "") -> Example:
    return Example(turns, {}, tools)


def _user(text: str) -> Turn:
    return Turn("user", text)


def _answer(text: str, **more: Any) -> Turn:
    return Turn("assistant", text, **more)


CASES = {
    "two exchanges": talk("Hi", "Yo.", "And?", "Bye."),
    "a system message": talk("Hi", "Yo.", "And?", "Bye.", system="Be kind."),
    "two questions in a row": _talk(_user("Hi"), _user("You?"), _answer("Yo.")),
    "thinking": _talk(_user("Hi"), _answer("Yo.", thinking="Hm."), _user("And?"), _answer("Bye.", thinking="So.")),
    "tools": _talk(
        _user("Hi"),
        _answer("", calls=(ToolCall("weather", '{"city": "Bonn"}', "call_1"),)),
        Turn("tool", "sunny", name="weather", call_id="call_1"),
        _answer("Fine."),
        tools=_TOOLS,
    ),
}
_SHORT = {
    "the chat template does not write ": "refused: writes no ",
    "the chat template refuses a conversation": "refused by the template",
}


def outcome(style: Style, case: str) -> str:
    """What becomes of a conversation, in a few words."""
    tokenizer = tokenizer_of(style)
    example = CASES[case]
    try:
        template, config = build("chat", tokenizer, max_tokens=4096)
    except UserError as error:
        return "refused: " + str(error).split("tokenizer ")[1].split(" (")[0]
    corpus = tokenization.encode_all([example], template, tokenizer, config)
    if corpus.dropped:
        why = corpus.dropped[0]
        return next((short + why.removeprefix(long) for long, short in _SHORT.items() if why.startswith(long)), why)
    encoded = tokenization.encode(example, template, tokenizer, config)
    answers = sum(turn.role == "assistant" for turn in example.turns)
    trained = trained_texts(encoded, tokenizer)
    notes = [note for notes in corpus.notes.values() for note in notes]
    words = "all trained" if len(trained) == answers else "the last answer trained"
    assert len(trained) in (1, answers)
    if case == "a system message":
        assert template.chat is not None
        words += "" if template.chat.takes_system else "; we fold it in"
    if case == "thinking":
        kept = [thought for thought in ("Hm.", "So.") if any(thought in text for text in trained)]
        words = {0: "left out, and told", 1: "of the last answer", 2: "all trained"}[len(kept)]
    assert (tokenization.EARLIER in notes) == (len(trained) < answers)
    return words


def table() -> str:
    """The table of docs/boundary.md."""
    lines = ["| family | what its template does | " + " | ".join(CASES) + " |", "|---" * (len(CASES) + 2) + "|"]
    for name, style in STYLES.items():
        lines.append(f"| {name} | {style.does} | " + " | ".join(outcome(style, case) for case in CASES) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    path = Path(__file__).resolve().parents[1] / "docs" / "boundary.md"
    head, _, rest = path.read_text(encoding="utf-8").partition("<!-- styles -->")
    tail = rest.partition("<!-- /styles -->")[2]
    path.write_text(f"{head}<!-- styles -->\n{table()}\n<!-- /styles -->{tail}", encoding="utf-8")
