"""Chat templates: the built-in ones of LLaDA and LLaDA2, and templates shipped with a tokenizer."""

import json
import re
import shutil
from pathlib import Path

import jinja2
import pytest
from tokenizers import Tokenizer

from memdlm_dist.data import chat, template_process
from memdlm_dist.data.dataset import TokenDataset
from memdlm_dist.data.preparation.prepare import prepare
from memdlm_dist.data.preparation.request import PrepareConfig
from memdlm_dist.data.sequences import BadRow
from memdlm_dist.data.template_process import Rendering, TemplateProcess
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError
from memdlm_dist.method.trajectory import IGNORE_INDEX
from tools import prepare_data

CONVERSATION = [
    {"role": "user", "content": "Add 1 and 2."},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "And 4?"},
    {"role": "assistant", "content": "7"},
]
TEMPLATES = {path.stem: path.read_text() for path in sorted(Path("tests/assets/templates").glob("*.jinja"))}
TEMPLATES["docs"] = re.findall("^```jinja\n(.*?)^```", Path("docs/data.md").read_text(), re.MULTILINE | re.DOTALL)[0]


def templated(tmp_path, chat_template=None, tokens=()):
    """Return the debug tokenizer with the given chat template and special tokens."""
    folder = tmp_path / "tokenizer"
    shutil.copytree("tests/assets/debug/tokenizer", folder)
    pieces = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pieces.add_special_tokens(list(tokens))
    pieces.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": chat_template}))
    return DiffusionTokenizer(str(folder))


def test_the_chat_template_of_llada(tmp_path):
    tokens = ["<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    pieces = templated(tmp_path, tokens=tokens)
    template = chat.chat_template("llada", pieces)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    user, assistant = header.format("user"), header.format("assistant")
    assert chat.segments(template, CONVERSATION) == [
        (f"<|startoftext|>{user}Add 1 and 2.<|eot_id|>{assistant}", False),
        ("3<|eot_id|>", True),
        (f"{user}And 4?<|eot_id|>{assistant}", False),
        ("7<|eot_id|>", True),
    ]
    assert template.fingerprint == "llada"
    assert chat.end_of_turn(template, pieces) == pieces.tokenizer.token_to_id("<|eot_id|>")
    with pytest.raises(UserError, match=r"lacks <\|startoftext\|>, which the chat template llada needs"):
        chat.chat_template("llada", DiffusionTokenizer("tests/assets/debug/tokenizer"))


def test_the_chat_template_of_llada2(tmp_path):
    pieces = templated(tmp_path, tokens=["<|role_end|>"])
    template = chat.chat_template("llada2", pieces)
    assert chat.segments(template, [{"role": "system", "content": "Be brief."}, *CONVERSATION]) == [
        (
            "<role>SYSTEM</role>Be brief.<|role_end|><role>HUMAN</role>Add 1 and 2.<|role_end|><role>ASSISTANT</role>",
            False,
        ),
        ("3<|role_end|>", True),
        ("<role>HUMAN</role>And 4?<|role_end|><role>ASSISTANT</role>", False),
        ("7<|role_end|>", True),
    ]
    assert chat.prompt(template, "Add.") == "<role>HUMAN</role>Add.<|role_end|><role>ASSISTANT</role>"
    assert template.fingerprint == "llada2"
    assert chat.end_of_turn(template, pieces) == pieces.tokenizer.token_to_id("<|role_end|>")
    with pytest.raises(BadRow, match=r"refuses the conversation \(it has no role tool, only system, user, assistant\)"):
        chat.segments(template, [CONVERSATION[0], {"role": "tool", "content": "3"}, CONVERSATION[1]])
    with pytest.raises(
        UserError, match=r"lacks <\|role_end\|>, which the chat template llada2 needs; use LLaDA2's own"
    ):
        chat.chat_template("llada2", DiffusionTokenizer("tests/assets/debug/tokenizer"))


def test_the_published_tokenizer_of_llada2(tmp_path, capsys):
    """Its vocabulary has the mask token, and its configuration does not name it."""
    pieces = templated(tmp_path, tokens=["<|role_end|>"])
    folder = Path(pieces.tokenizer_path)
    unnamed = {key: value for key, value in pieces.config.items() if key not in ("mask_token", "chat_template")}
    (folder / "tokenizer_config.json").write_text(json.dumps(unnamed))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": CONVERSATION}) + "\n")
    arguments = [
        "--input", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out"), "--seq-len", "160",
        "--held-out", "0", "--tokenizer", str(folder), "--chat-template", "llada2",
    ]  # fmt: skip
    assert prepare_data.main(arguments) == 2
    assert "names no mask_token; give --mask-token NAME" in capsys.readouterr().err
    assert prepare_data.main([*arguments, "--mask-token", "<|mask|>"]) == 0
    adopted = DiffusionTokenizer(str(tmp_path / "out/tokenizer"))
    assert adopted.mask_id == pieces.mask_id and adopted.get_vocab_size() == pieces.get_vocab_size()
    sample = TokenDataset(local=str(tmp_path / "out/train"), batch_size=1, shuffle=False, check_hash="xxh64")[0]
    turn_end = pieces.tokenizer.token_to_id("<|role_end|>")
    assert sample["tokens"].tolist().count(turn_end) == 4
    learnt = sample["tokens"][sample["labels"] != IGNORE_INDEX].tolist()
    assert learnt.count(turn_end) == 2 and pieces.tokenizer.decode(learnt) == "37"


def test_the_chat_template_of_a_tokenizer(tmp_path):
    source = (
        "{% for m in messages %}<role>{{ m.role | upper }}</role>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
    )
    template = chat.chat_template("tokenizer", templated(tmp_path, source))
    assert chat.segments(template, CONVERSATION)[:2] == [
        ("<role>USER</role>Add 1 and 2.<role>ASSISTANT</role>", False),
        ("3", True),
    ]
    with pytest.raises(UserError, match="has no chat template"):
        chat.chat_template("tokenizer", DiffusionTokenizer("tests/assets/debug/tokenizer"))


def test_the_choice_of_a_template(tmp_path, capsys):
    """Same choice as in transformers: first chat_template.jinja, then the template named default."""
    entry = {"name": "default", "template": "{{ eos_token }}{{ bos_token }}{{ messages[0].content }}"}
    pieces = templated(tmp_path, [{"name": "rag", "template": "{{ documents }}"}, entry])
    pieces.config |= {"bos_token": None}
    template = chat.chat_template("tokenizer", pieces)
    assert template(CONVERSATION, False) == "<|endoftext|>Add 1 and 2."
    assert chat.end_of_turn(template, pieces) is None, "the template drops the response"
    pieces.config["chat_template"][1]["template"] += "!"
    assert chat.chat_template("tokenizer", pieces).fingerprint != template.fingerprint
    pieces.config["chat_template"][1] = {"name": "tool_use", "template": ""}
    with pytest.raises(
        UserError, match=r"has several chat templates \(rag, tool_use\) and none named default; save one"
    ):
        chat.chat_template("tokenizer", pieces)
    (Path(pieces.tokenizer_path) / "chat_template.jinja").write_text("file {{ tools }}")
    assert chat.chat_template("tokenizer", pieces)(CONVERSATION, False) == "file None"

    own = tmp_path / "own.jinja"
    own.write_text("{% generation %}")
    with pytest.raises(UserError, match=r"The chat template .*own.jinja cannot be read \(.*endgeneration.*; choose"):
        chat.chat_template(str(own), pieces)
    own.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"The chat template .*own.jinja cannot be read \(.*; restore the file"):
        chat.chat_template(str(own), pieces)
    required = ["--builtin", "--tokenizer", "x", "--seq-len", "8", "--output", "x", "--chat-template"]
    for name, message in [
        ("lada", "'lada' is neither llada nor llada2 nor tokenizer nor a file *.jinja"),
        ("none.jinja", "there is no file none.jinja"),
    ]:
        with pytest.raises(SystemExit):
            prepare_data.parser().parse_args([*required, name])
        assert f"argument --chat-template: {message}" in capsys.readouterr().err
    assert prepare_data.parser().parse_args([*required, str(own)]).chat_template == str(own)


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_responses_are_those_of_hugging_face(name):
    hugging_face = pytest.importorskip("transformers.utils.chat_template_utils")
    system = {"role": "system", "content": " Be <brief> & kind. "}
    tools = [
        {"role": "user", "content": 'And "4"? 🙂'},
        {"role": "assistant", "content": "<think>\nLook 🙂\n</think>\n\nadd(3, 4)"},
        {"role": "tool", "content": "<b>7</b>"},
        {"role": "assistant", "content": "<think>\nEasy</think>\n 7 🙂 \n"},
    ]
    source, constants = TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"}
    template = TemplateProcess(source, constants, 10_000)
    assert template.has_generation_blocks
    for messages in (CONVERSATION, [*CONVERSATION, *tools], [system, *tools], [system, *CONVERSATION[:1]]):
        for prompt in (False, True):
            rendering = template.render(messages=messages, add_generation_prompt=prompt)
            texts, spans = hugging_face.render_jinja_template(
                [messages],
                chat_template=source,
                return_assistant_tokens_mask=True,
                add_generation_prompt=prompt,
                **constants,
            )
            assert rendering == Rendering(texts[0], spans[0])
            assert len(rendering.spans) == sum(message["role"] == "assistant" for message in messages)


@pytest.mark.parametrize(
    "block",
    [
        "{% macro turn() %}assistant: {{ BLOCK }}{% endmacro %}{{ turn() }}",
        "{% set turn %}{{ BLOCK }}{% endset %}assistant: {{ turn }}",
        "{% set turn %}{{ BLOCK }}{% endset %}",
        "{% filter upper %}{{ BLOCK }}{% endfilter %}",
        "{% generation %}{{ BLOCK }}{% endgeneration %}",
    ],
)
def test_a_generation_block_must_be_written_directly(block):
    """Anywhere else transformers returns wrong spans."""
    direct = "{% generation %}{{ messages[1].content }}yes{% endgeneration %}"
    condition = "{% if messages | length > 1 %}" + block.replace("{{ BLOCK }}", direct) + "{% endif %}"
    template = TemplateProcess("{{ messages[0].content }}" + condition, {}, 10_000)
    with pytest.raises(jinja2.TemplateError, match="a generation block is inside a macro"):
        template.render(messages=CONVERSATION)
    assert template.render(messages=CONVERSATION[:1]) == ("Add 1 and 2.", []), "the next row is rendered"


def test_generation_blocks_are_the_responses(tmp_path):
    """Rows of every chat format: the template rewrites earlier turns, and only its generation blocks are learnt."""
    think = "<think>\nSure\n</think>\n\n"
    turns = [
        ("human", "Add."),
        ("gpt", f"{think}What?"),
        ("observation", "1"),
        ("human", "1 and 2."),
        ("gpt", think + "3"),
    ]
    rows = [
        {"system": "Be brief.", "conversations": [{"from": role, "value": text} for role, text in turns]},
        {"conversations": [{"from": role, "value": text} for role, text in [*turns, ("human", "Thanks!")]]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": text} for text in ("Say ", "<|im_end|>")]},
                      {"role": "assistant", "content": "no"}]},
        {"messages": [{"role": "user", "content": "Say yes."}]},
        {"prompt": "Say yes.", "response": "yes"},
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pieces = templated(tmp_path, tokens=["<|im_start|>", "<|im_end|>"])
    thinking = "tests/assets/templates/thinking.jinja"
    template = chat.chat_template(thinking, pieces)
    assert chat.segments(template, CONVERSATION) == [
        ("<|im_start|>user\nAdd 1 and 2.<|im_end|>\n<|im_start|>assistant\n", False),
        ("3<|im_end|>", True),
        ("\n<|im_start|>user\nAnd 4?<|im_end|>\n<|im_start|>assistant\n", False),
        ("<think>\n\n</think>\n\n7<|im_end|>", True),
    ], "the last segment is a response, so that end-of-text follows it"
    assert chat.end_of_turn(template, pieces) == pieces.tokenizer.token_to_id("<|im_end|>")
    assert chat.prompt(template, "Add.") == "<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n"
    arguments = [
        "--input", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out"), "--seq-len", "160",
        "--held-out", "0", "--tokenizer", pieces.tokenizer_path, "--chat-template", thinking,
    ]  # fmt: skip
    assert prepare_data.main(arguments) == 0
    problems = json.loads((tmp_path / "out/summary.json").read_text())["problems"]
    assert [problem.split("rows.jsonl:")[1][:60] for problem in problems] == [
        "3: a message contains the special or added token '<|im_end|>",
        "4: the row has no response to learn from",
    ]
    shards = TokenDataset(local=str(tmp_path / "out/train"), batch_size=1, shuffle=False, check_hash="xxh64")
    assert shards.size == 3
    decoded = []
    for sample in (shards[0], shards[1], shards[2]):
        learnt = sample["labels"] != IGNORE_INDEX
        decoded.append([pieces.tokenizer.decode(sample["tokens"][choice].tolist()) for choice in (~learnt, learnt)])
    prompt = "user\nAdd.\nassistant\n\nuser\n<tool_response>\n1\n</tool_response>\nuser\n1 and 2.\nassistant\n"
    assert decoded == [
        [f"system\nBe brief.\n{prompt}", f"What?{think}3"],
        [prompt, f"What?{think}3"],
        ["user\nSay yes.\nassistant\n", "<think>\n\n</think>\n\nyes"],
    ]


@pytest.mark.parametrize(
    "source, message",
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            "the chat template refuses the conversation (roles must alternate)",
        ),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refuses the conversation"),  # out of the sandbox
        (
            "{{ messages[-1].content }}",
            "rewrites earlier turns when another turn follows (choose a template that marks responses by {% generation",
        ),
        (
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]<think>{% endif %}",
            "begins a response in another way than its generation prompt (choose a template that marks",
        ),
        ("{{ '\\ud83d' }}", "the chat template refuses the conversation (rendering is not valid Unicode)"),
        ("{{ messages[0].content }}", "the chat template renders no response"),
        ("{% if false %}{% generation %}{% endgeneration %}{% endif %}", "the chat template renders no response"),
    ],
)
def test_a_template_that_misbehaves_makes_bad_rows(tmp_path, source, message):
    template = chat.chat_template("tokenizer", templated(tmp_path, source))
    with pytest.raises(BadRow, match=re.escape(message)):
        chat.segments(template, CONVERSATION)
    if "refuses" in message:
        with pytest.raises(UserError, match="The chat template refuses the prompt"):
            chat.prompt(template, "Add.")


PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|eot|>{% endfor %}"


@pytest.mark.parametrize(
    "source, message",
    [
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        (
            "{% for i in range(99999) %}{% for j in range(999) %}{{ messages }}{% endfor %}{% endfor %}",
            "rendering (needs|takes)",
        ),
        # The limit that is hit first depends on the machine.
        (
            "{{ 'x' * 10 ** 9 }}",
            "rendering (writes more than 67,108,864 characters|needs more than 1,073,741,824 bytes|takes)",
        ),
        ("{{ 'x'.ljust(10 ** 12) }}", "rendering needs more than 1,073,741,824 bytes of memory"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "rendering takes longer than 1 s",
        ),
    ],
)
def test_a_template_has_bounds(tmp_path, source, message, monkeypatch):
    monkeypatch.setattr(template_process, "TIMEOUT_SECONDS", 1)
    limited = "{% if messages | length > 1 %}" + source + "{% endif %}"
    template = chat.chat_template("tokenizer", templated(tmp_path, limited))
    with pytest.raises(ValueError, match=f"the chat template refuses the conversation .*{message}"):
        chat.segments(template, CONVERSATION)
    assert template(CONVERSATION[:1], False) == "", "the next row is rendered"


@pytest.mark.parametrize("name", chat.TEMPLATES)
def test_messages_are_text(tmp_path, name):
    """Only the template's own markup is parsed: a message that contains special tokens makes a bad row."""
    end = {"llada": "<|eot_id|>", "llada2": "<|role_end|>", "tokenizer": "<|eot|>"}[name]
    tokens = ["<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|role_end|>", "<|eot|>"]
    pieces = templated(tmp_path, PLAIN, tokens)
    rows = [
        [{"role": role, "content": content}, {"role": "assistant", "content": "yes"}]
        for role, content in [
            ("user", "Say <|mask|>."), ("user", f"Say {end}"), ("user", "Say yes."), (f"user{end}", "Say no."),
        ]
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    request = PrepareConfig(
        output=tmp_path / "out",
        seq_len=160,
        inputs=(str(tmp_path / "rows.jsonl"),),
        tokenizer=pieces.tokenizer_path,
        chat_template=name,
        held_out=0.0,
    )
    summary = prepare(request, report=lambda _: None)
    assert summary.bad_rows == 3 and summary.sequences["train"] == 1
    for line, token in ((1, "<|mask|>"), (2, end), (4, end)):
        assert any(
            f"rows.jsonl:{line}: a message contains the special or added token '{token}'" in p for p in summary.problems
        )
    shards = TokenDataset(local=str(tmp_path / "out/train"), batch_size=1, shuffle=False, check_hash="xxh64")
    ids = shards[0]["tokens"].tolist()
    assert ids.count(pieces.tokenizer.token_to_id(end)) == 2 and pieces.mask_id not in ids


def test_alpaca_rows_as_conversations(tmp_path):
    """LongAlpaca's preparation: the template's turns, loss on the response and on the padding after it."""
    rows = [{"instruction": f"Add {i}.", "input": "to 1", "output": f"{i + 1}"} for i in range(20)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    source = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    pieces = templated(tmp_path, source)
    arguments = [
        "--input", str(tmp_path / "rows.json"), "--output", str(tmp_path / "out"), "--seq-len", "48",
        "--tokenizer", pieces.tokenizer_path, "--chat-template", "tokenizer", "--held-out", "0",
    ]  # fmt: skip
    assert prepare_data.main(arguments) == 0
    shards = TokenDataset(local=str(tmp_path / "out/train"), batch_size=1, shuffle=False, check_hash="xxh64")
    assert shards.size == 20
    sample = shards[4]
    maskable = sample["labels"] != IGNORE_INDEX
    first = int(maskable.int().argmax())
    assert maskable[first:].all()
    assert pieces.tokenizer.decode(sample["tokens"][:first].tolist()) == "[user]Add 4.\n\nto 1[assistant]"
    assert pieces.tokenizer.decode(sample["tokens"][first:].tolist()) == "5"
    assert (sample["tokens"][first + 1 :] == pieces.eos_id).all()
