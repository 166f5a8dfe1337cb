"""Names of the Hugging Face hub: downloads, cached copies, links in the cache, and one sentence for each failure."""

import json
import re
from pathlib import Path

import datasets
import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
import torch
from huggingface_hub.utils._http import reset_sessions

from memdlm_dist.checkpoint import peft_folder
from memdlm_dist.config import parse_config, repositories
from memdlm_dist.data.preparation import prepare
from memdlm_dist.data.preparation.request import PrepareConfig
from memdlm_dist.data.tokenizer import DiffusionTokenizer, adopt
from memdlm_dist.errors import UserError
from memdlm_dist.models.lora import LoRA
from memdlm_dist.runtime import hub
from tests.support import ranks
from tests.support.hub_server import COMMIT, contents, serving
from tests.support.published import contents as tensors
from tools import convert_checkpoint, random_weights

RECIPE = "train_configs/llada_8b_longalpaca.toml"
TOKENIZER = "tests/assets/debug/tokenizer"
DEBUG = ["--model.flavor", "debug", "--training.mixed_precision_param", "float32", "--lora.base", "unquantized"]


@pytest.fixture(autouse=True)
def in_root(root, monkeypatch):
    monkeypatch.chdir(root)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # another test may have made this process a rank
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Return a folder like published weights, with files that are not downloaded."""
    folder = tmp_path_factory.mktemp("published") / "weights"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        assets = ["--model.hf_assets_path", TOKENIZER, "--checkpoint.initial_load_path", ""]
        assert random_weights.main([RECIPE, "--output", str(folder), *DEBUG, *assets]) == 0
    (folder / "modeling_llada.py").write_text("raise SystemExit('executed')\n")
    for name in ("pytorch_model.bin", "optimizer.pt", "state.pkl", "README.md"):
        (folder / name).write_bytes(b"not wanted")
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Point huggingface_hub and datasets at empty caches, offline."""
    use_cache(monkeypatch, tmp_path / "home")
    return tmp_path / "home"


def use_cache(patch, home, url=None):
    constants = huggingface_hub.constants
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_HUB_OFFLINE", url is None)
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", url is None)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(home / "datasets"))
    reset_sessions()  # sessions know whether they are offline
    if url is not None:
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(datasets.config, "HF_ENDPOINT", url)
        patch.setattr(datasets.config, "HUB_DATASETS_URL", url + "/datasets/{repo_id}/resolve/{revision}/{path}")
        patch.setattr(datasets.config, "USE_PARQUET_EXPORT", False)  # another server
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def test_names_of_repositories_and_names_of_files(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "folder").mkdir(parents=True)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "dangling").symlink_to("nowhere")
    assert hub.parse("GSAI-ML/LLaDA-8B-Base") == ("GSAI-ML/LLaDA-8B-Base", None)
    assert hub.parse("org/name-v1.5@refs/pr/1") == ("org/name-v1.5", "refs/pr/1")
    for path in (
        "data/folder", "data/missing", "data/x@main", "link/dangling",
        "./org/name", "/org/name", "../org", "name", "org/name/sub", "s3://bucket/name",
        "corpus/missing.jsonl", "corpus/a.json.zst", "corpus/A.JSONL", "corpus/a.lz4", "corpus/a.csv@v2",
        "corpus/a@b.JSON", "corpus/*",
        "org/na..me", "org/na--me", "org/name@", "org/x@../y",
        "",
    ):  # fmt: skip
        assert hub.parse(path) is None, path
        if path:
            assert hub.tokenizer(path) == path
    # Some clusters set WORLD_SIZE for processes that no launcher started.
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert hub.tokenizer("data/missing") == "data/missing"
    cached = "/x/hub/models--GSAI-ML--LLaDA-8B-Base/snapshots/abc"
    assert hub.origin(cached) == ("GSAI-ML/LLaDA-8B-Base", "abc") and hub.origin("/x/models/y") is None


def test_a_repository_is_downloaded_once_and_then_read_from_links_in_the_cache(
    published, cache, tmp_path, monkeypatch, capsys
):
    named = ["--model.hf_assets_path", "org/name", "--checkpoint.initial_load_path", "org/name@main"]
    recipe = str(tmp_path / "recipe.toml")
    Path(recipe).write_text(Path(RECIPE).read_text().replace('converters = ["lora"]', ""))
    files = contents(published) | {"original/model.safetensors": b"not wanted"}
    with serving({"org/name": files}) as server:
        use_cache(monkeypatch, cache, server.url)
        folder = Path(hub.tokenizer("org/name"))
        hub.tokenizer("org/name")
        line = f"Reading the repository org/name of the Hugging Face hub from {folder}.\n"
        assert folder.name == COMMIT and capsys.readouterr().err.count(line) == 1
        assert set(server.downloaded) == {"tokenizer.json", "tokenizer_config.json", "config.json"} & files.keys()
        assert (folder / "tokenizer.json").is_symlink()
        config = parse_config.parse(["--job.config_file", RECIPE, *DEBUG, *named])
        found = repositories.downloaded(config, weights=True)
        assert found.checkpoint.initial_load_path == found.model.hf_assets_path == str(folder)
        assert config.checkpoint.initial_load_path == "org/name@main"
        wanted = {name for name in contents(published) if not name.endswith((".bin", ".pt", ".pkl", ".md"))}
        assert len(server.downloaded) == len(set(server.downloaded)) and set(server.downloaded) == wanted
    use_cache(monkeypatch, cache)  # offline from here on
    assert DiffusionTokenizer(hub.tokenizer("org/name")).fingerprint() == DiffusionTokenizer(TOKENIZER).fingerprint()
    there, back = str(tmp_path / "there"), tmp_path / "back"
    assert convert_checkpoint.main(["from-hf", recipe, "--input", "org/name", "--output", there, *DEBUG, *named]) == 0
    to_hf = ["to-hf", recipe, "--checkpoint", there, "--output"]
    assert convert_checkpoint.main([*to_hf, str(back), *DEBUG, *named]) == 0
    ours, theirs = tensors(back), tensors(published)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not (back / "tokenizer.json").is_symlink()
    # PEFT is told the repository, not a folder of this machine.
    sd_adapter = convert_checkpoint.get_conversion(config).sd_adapter
    peft_folder.write({}, str(tmp_path / "adapter"), sd_adapter, LoRA(rank=8, alpha=16.0), str(folder))
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("org/name", COMMIT)
    # A copy of another selection lacks files, and another program may have downloaded pickles.
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match=r"^The copy of the repository org/name in \S+ has no file \*\.safetensors; "):
        hub.weights("org/name")
    (folder / "tokenizer_config.json").unlink()
    for use in (DiffusionTokenizer, lambda name: adopt(name, tmp_path / "adopted", None, None)):
        with pytest.raises(UserError, match=f"^The cached copy of the repository org/name@{COMMIT} in .+ incomplete; "):
            use(hub.tokenizer("org/name"))
    (folder / "model.safetensors").touch()
    (folder / ".metadata").touch()
    with pytest.raises(UserError, match=r"^The repository org/name holds a torch checkpoint \(\.metadata\), "):
        hub.weights("org/name")


def test_each_failure_is_one_sentence(cache, monkeypatch, capsys):
    def sentence(name):
        with pytest.raises(UserError) as caught:
            hub.weights(name)
        message = str(caught.value)
        assert message.startswith(f"There is no folder {name}, and ") and message.endswith(".") and "\n" not in message
        return message

    assert "no cached copy of the hub's repository org/name (HF_HUB_OFFLINE is set); download it" in sentence(
        "org/name"
    )
    with serving({"org/name": {}, "org/gated": "GatedRepo"}) as server:
        use_cache(monkeypatch, cache, server.url)
        assert "the hub's repository org/gated is gated; ask for access on its page" in sentence("org/gated")
        assert "the hub has no repository org/other that is public" in sentence("org/other")
        assert "repository org/name has no revision 'v2'; correct it." in sentence("org/name@v2")
    assert f"no cached copy of the hub's repository org/name ({server.url} cannot be reached, " in sentence("org/name")
    argv = ["from-hf", RECIPE, "--input", "org/name", "--output", "unused", *DEBUG]
    assert convert_checkpoint.main(argv) == 2
    assert re.fullmatch(r"error: There is no folder org/name, and [^\n]+\.\n", capsys.readouterr().err)


def test_one_rank_of_a_node_downloads(cache, monkeypatch):
    """Four ranks on two nodes; the ranks of a node share a cache and a working folder."""
    for folder in ("node0/both", "node1/both", "node0/mine/tokenizer", "node1/mine", "node1/theirs"):
        (cache / folder).mkdir(parents=True)
    with serving({"org/name": contents(Path(TOKENIZER))}) as server:

        def body(rank):
            monkeypatch.setenv("GROUP_RANK", str(rank // 2))
            monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
            monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
            use_cache(monkeypatch, cache / f"node{rank // 2}", server.url)
            folder = Path(hub.tokenizer("org/name"))
            assert folder.is_relative_to(cache / f"node{rank // 2}") and (folder / "tokenizer.json").is_file()
            with pytest.raises(UserError, match="the hub has no repository org/other"):
                hub.tokenizer("org/other")
            use_cache(monkeypatch, cache / f"node{rank // 2}")
            if rank == 2:
                folder.rename(folder.with_name("f" * 40))
                (folder.parents[1] / "refs" / "main").write_text("f" * 40)
            with pytest.raises(UserError, match=f"^The nodes have different revisions .*org/name .{COMMIT}, fffff"):
                hub.tokenizer("org/name")
            # Each node sees other paths.
            monkeypatch.chdir(cache / f"node{rank // 2}")
            assert hub.tokenizer("both/missing") == "both/missing"
            with pytest.raises(UserError, match=r"^Node 1 lacks the folder mine/tokenizer, which node 0 has; copy"):
                hub.tokenizer("mine/tokenizer")
            with pytest.raises(UserError, match=r"^Node 0 lacks the folder theirs, which node 1 has, and no node"):
                hub.tokenizer("theirs/tokenizer")
            return 0

        assert ranks.fork(4, body) == 0
    assert server.downloaded.count("tokenizer.json") == 2
    # Each download asks whether the hub answers, and then for the list of files.
    assert sorted(server.described) == ["org/name"] * 4 + ["org/other"] * 4


ROWS = [
    {"prompt": "one", "response": "first", "tools": {"a": 1}},
    {"prompt": "two", "response": "second", "tools": {"b": ["x"]}},
    {"prompt": "three", "response": None, "tools": None},
]


def test_a_dataset_of_the_hub_is_prepared_like_its_files_and_again_from_the_cache(cache, tmp_path, monkeypatch, capfd):
    def run(name, output, **changes):
        settings = {"seq_len": 32, "tokenizer": TOKENIZER, "held_out": 0.0} | changes
        reports: list[str] = []
        summary = prepare.prepare(PrepareConfig(tmp_path / output, inputs=(name,), **settings), reports.append)
        return summary, reports, {path.name: path.read_bytes() for path in (tmp_path / output / "train").glob("*.mds")}

    def sentence(name, **changes):
        with pytest.raises(UserError) as caught:
            run(name, "refused", **changes)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / "rows.jsonl").write_bytes(lines)
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files: [{{split: {split}, path: {name}.jsonl}}]\n"
        for name, split in (("main", "train"), ("more", "test"))
    )
    pictures = {"pictures.tar": b"", "README.md": b"x"}
    served = {
        "org/data": {"train.jsonl": lines, "state.pkl": b"x"},
        "org/parts": {"README.md": f"{card}---\n".encode(), "main.jsonl": lines, "more.jsonl": lines},
        "org/pictures": pictures,
        "org/gated": "GatedRepo",
    }
    expected, _, shards = run(str(tmp_path / "rows.jsonl"), "files")
    with serving(served) as server:
        use_cache(monkeypatch, cache, server.url)
        found, reports, ours = run("org/data", "hub")
        line = f"Reading the split train of the dataset org/data@{COMMIT} of the Hugging Face hub"
        assert f"{line}.\n" in capfd.readouterr().err
        assert found.repositories == [f"org/data@{COMMIT}"] and not expected.repositories
        assert ours == shards and found.sequences == expected.sequences and found.bad_rows == 1
        assert "org/data[train]:3: " in reports[0] and "state.pkl" not in server.downloaded
        assert run("org/parts", "more", subset="more", split="test")[2] == shards
        assert re.match(r"The dataset org/parts cannot be opened \(.+\['main', 'more'\]", sentence("org/parts"))
        assert re.match(
            r"The dataset org/parts cannot .+ --subset none \(.+'more'", sentence("org/parts", subset="none")
        )
        assert "Should be one of ['train']); choose another --split" in sentence("org/data", split="test")
        assert sentence("org/pictures").startswith("The dataset org/pictures is in the format webdataset, which is not")
        for name, reason in (("gated", "a gated dataset"), ("other", "doesn't exist"), ("data@v2", "Revision 'v2'")):
            message = sentence(f"org/{name}")
            assert message.startswith(f"There is no file or folder org/{name}, and ") and reason in message
    # Without a server and without HF_HUB_OFFLINE, the cached copy is read at once.
    capfd.readouterr()
    assert run("org/data", "unreachable")[2] == shards
    errors = capfd.readouterr().err.splitlines()
    assert any(text.startswith(f"{line} from the cache ({server.url} cannot be reached, ") for text in errors)
    assert not [text for text in errors if text and not text.startswith("Reading ") and "Tokenising" not in text]
    assert f"no cached copy of the hub's dataset org/other ({server.url} cannot be reached, " in sentence("org/other")
    assert not capfd.readouterr().err and not datasets.config.HF_HUB_OFFLINE
    use_cache(monkeypatch, cache)
    assert run("org/data", "again")[2] == run(f"org/data@{COMMIT}", "commit")[2] == shards
    assert re.search(f"the cached copy of the dataset org/data is of commit {COMMIT}; ", sentence("org/data@v2"))
    assert "no cached copy of the hub's dataset org/other (HF_HUB_OFFLINE is set)" in sentence("org/other")
    assert sentence("corpus/missing.jsonl").startswith("The input corpus/missing.jsonl matches no file; ")
