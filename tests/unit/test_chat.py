"""Chat templates: the built-in LLaDA template, and templates shipped with a tokenizer."""

import json
import re
import shutil

import pytest
from tokenizers import Tokenizer

from memdlm_dist.data import chat, template_process
from memdlm_dist.data.dataset import TokenDataset
from memdlm_dist.data.prepare import PrepareConfig, prepare
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
    template = chat.chat_template("llada", templated(tmp_path, tokens=tokens))
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    user, assistant = header.format("user"), header.format("assistant")
    assert chat.segments(template, CONVERSATION) == [
        (f"<|startoftext|>{user}Add 1 and 2.<|eot_id|>{assistant}", False),
        ("3<|eot_id|>", True),
        (f"{user}And 4?<|eot_id|>{assistant}", False),
        ("7<|eot_id|>", True),
    ]
    with pytest.raises(UserError, match=r"lacks <\|startoftext\|>, which the chat template llada needs"):
        chat.chat_template("llada", DiffusionTokenizer("tests/assets/debug/tokenizer"))


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


@pytest.mark.parametrize(
    "source, message",
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            "the chat template refuses the conversation (roles must alternate)",
        ),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refuses the conversation"),  # out of the sandbox
        ("{{ messages[-1].content }}", "rewrites earlier turns when another turn follows"),
    ],
)
def test_a_template_that_misbehaves_makes_bad_rows(tmp_path, source, message):
    template = chat.chat_template("tokenizer", templated(tmp_path, source))
    with pytest.raises(ValueError, match=re.escape(message)):
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
    tokens = ["<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eot|>"]
    pieces = templated(tmp_path, PLAIN, tokens)
    end = "<|eot_id|>" if name == "llada" else "<|eot|>"
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
