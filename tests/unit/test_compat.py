"""Assumptions that memdlm_dist/compat makes about other projects, one test each.

An upgrade that breaks an assumption fails here, by name.
"""

import argparse
import inspect
import itertools
import json
import logging
import os
import sys
import threading
from multiprocessing.shared_memory import SharedMemory as BuiltinSharedMemory
from pathlib import Path
from types import SimpleNamespace

import joblib
import numpy as np
import pytest
import streaming.base.shared.prefix as shared_prefix
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.staging as staging
import torchtitan.components.checkpoint as titan_checkpoint
import torchtitan.components.metrics as titan_metrics
import torchtitan.distributed.utils as titan_distributed
import torchtitan.models.moe.moe as titan_moe
import torchtitan.models.moe.utils as titan_moe_utils
import torchtitan.tools.utils as titan_utils
import torchtitan.train as titan_train
from joblib._parallel_backends import LokyBackend
from joblib.externals.loky.process_executor import TerminatedWorkerError
from safetensors import safe_open
from safetensors.torch import save_file
from streaming import StreamingDataset
from streaming.base import dataset as streaming_dataset
from streaming.base.sampling import get_sampling
from streaming.base.shared import SharedMemory
from streaming.base.storage.download import DOWNLOADER_MAPPINGS, CloudDownloader
from torch import nn
from torch.distributed import run
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.elastic.multiprocessing import api as elastic
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as fsdp_collectives
from torch.nn.attention import SDPBackend
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import ConfigManager

from memdlm_dist.compat import joblib as joblib_seam
from memdlm_dist.compat import streaming as streaming_seam
from memdlm_dist.compat import torch as torch_seam
from memdlm_dist.compat import torchao, torchrun
from memdlm_dist.compat import torchtitan as titan_seam
from memdlm_dist.compat.torch import skip_if_flagged, supports_reuse_of_stagers, supports_skip_flag
from memdlm_dist.data.sequences import TrainingSequence
from memdlm_dist.data.shards import Card, ShardWriter
from memdlm_dist.models.attention import BidirectionalAttentionKernel
from memdlm_dist.runtime import device


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_torchtitan_decides_on_the_device_by_torchs_private_function():
    assert "_get_available_device_type() or" in inspect.getsource(titan_utils.get_device_info)
    assert titan_utils.device_type == device.device_type()


@pytest.mark.skipif(device.has_accelerator(), reason="nothing is patched where there is an accelerator")
def test_torchtitan_finds_on_the_cpu_what_it_asks_of_a_device():
    monitor = titan_metrics.build_device_memory_monitor()
    monitor.reset_peak_stats()
    assert monitor.get_peak_stats().max_reserved_gib > 0
    counted = torch.histc(torch.tensor([0, 2, 2]), bins=3, min=0, max=3)
    assert counted.tolist() == [1, 0, 2]
    assert torch.histc(torch.tensor([0.5]), bins=2, min=0, max=1).tolist() == [0, 1]


def test_attention_has_a_deterministic_kernel_after_cudnns():
    """Deterministic mode makes torch skip cuDNN; flash attention then has a deterministic backward pass."""
    cudnn, *fallbacks = BidirectionalAttentionKernel().sdpa_backends
    assert (cudnn, *fallbacks) == (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
    set_up = inspect.getsource(titan_distributed.set_determinism)
    for text in ("torch.use_deterministic_algorithms(True", "CUBLAS_WORKSPACE_CONFIG", "_compiled_flex_attn"):
        assert text in set_up


def test_experts_are_permuted_by_a_function_of_the_module():
    assert "generate_permute_indices" in inspect.getsource(titan_moe_utils._permute)
    assert "torch.histc" in inspect.getsource(titan_moe)
    x, counts = torch.arange(12.0).view(6, 2), torch.tensor([4, 2])
    seen = []

    def run(padded, sizes):
        seen.append((len(padded), sizes.tolist()))
        return 2 * padded

    assert torch.equal(titan_seam.run_padded(run, x, counts, 1, 2), 2 * x)
    assert seen[0][1] == [8, 8] and seen[0][0] >= 16


def test_pending_results_are_a_class_of_their_own():
    x = torch.ones(2)
    assert torch_seam.wait_if_pending(x) is x
    assert issubclass(torch_seam.AsyncCollectiveTensor, torch.Tensor)
    assert parameters(torch_seam.all_to_all_single_autograd)[:4] == [
        "self", "output_split_sizes", "input_split_sizes", "group",
    ]  # fmt: skip


def test_ring_attention_has_its_switches():
    assert hasattr(torch_seam.ring_attention._cp_options, "enable_load_balance")
    assert parameters(torch_seam.ring_attention.set_rotate_method) == ["rotate_method"]


def test_grouped_products_take_the_ends_of_groups():
    x, w = torch.randn(4, 8).bfloat16(), torch.randn(2, 3, 8).bfloat16()
    out = torch_seam.grouped_mm(x, w, torch.tensor([1, 4], dtype=torch.int32))
    assert torch.allclose(out.float()[1:], (x[1:] @ w[1].T).float(), atol=0.1)


def test_variable_length_attention_attends_in_both_directions_by_default():
    parameters = inspect.signature(torch_seam.varlen_attn).parameters
    assert list(parameters)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert "window_size" not in parameters or parameters["window_size"].default == (-1, -1)
    assert "is_causal" not in parameters or parameters["is_causal"].default is False
    assert torch.ops.torch_attn._varlen_attn.default in titan_seam.SAVED_OPERATORS


def test_a_checkpointed_block_holds_the_block():
    block = nn.Linear(1, 1)
    assert torch_seam.checkpointed(block) is None and torch_seam.checkpointed(checkpoint_wrapper(block)) is block


def test_recompilation_has_a_limit_that_can_be_raised():
    before = torch._dynamo.config.recompile_limit
    torch_seam.raise_recompile_limit(before - 1)
    assert torch._dynamo.config.recompile_limit == before


def test_readers_of_checkpoints_slice_entries_out_of_files():
    assert parameters(FileSystemReader._slice_file) == ["self", "file", "sinfo"]
    assert "self._slice_file(" in inspect.getsource(FileSystemReader.read_data)
    assert issubclass(torch_seam.FsspecEntryReader, FileSystemReader)


def test_operators_have_qualified_names():
    names = []

    class Names(torch_seam.TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            names.append(torch_seam.operator_name(operator))
            return operator(*args, **(kwargs or {}))

    with Names():
        torch.ones(1).add(1)
    assert "aten::add" in names


def test_gloo_and_torch_save_say_what_went_wrong_in_words():
    lost = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:1] Connection closed by peer. More.")
    assert torch_seam.connection_loss(lost) == "Connection closed by peer"
    assert torch_seam.connection_loss(RuntimeError("shapes differ")) == ""
    assert "written to its end" in torch_seam.storage_error("[enforce fail at inline_container.cc:664] . x")
    with pytest.raises(RuntimeError, match=r"inline_container\.cc"):
        torch.save(torch.ones(10_000), open("/dev/full", "wb"))  # noqa: SIM115  (closing it fails too)


def test_a_stager_that_closes_itself_is_not_reused(monkeypatch):
    """Torch 2.11 closes it after the first state dict."""
    supports_reuse_of_stagers.cache_clear()
    stage = staging.DefaultStager._stage
    if torch.__version__ >= "2.13":
        assert supports_reuse_of_stagers()
    supports_reuse_of_stagers.cache_clear()

    def stage_and_close(self, state_dict, **options):
        staged = stage(self, state_dict, **options)
        self._state_dict_stager.close()
        return staged

    monkeypatch.setattr(staging.DefaultStager, "_stage", stage_and_close)
    assert not supports_reuse_of_stagers()
    supports_reuse_of_stagers.cache_clear()


def test_torchruns_agent_logs_whom_it_kills():
    source = inspect.getsource(elastic)
    assert 'log.warning(\n                            "Unable to shutdown process' in source or (
        '"Unable to shutdown process' in source
    )
    assert elastic.__name__ == torchrun.AgentLog.NAME and "exitcode: %s)" in source
    log = torchrun.AgentLog(explained=2)
    kills = logging.LogRecord("x", 30, "", 0, "Unable to shutdown process %s via %s", (17, "SIGTERM"), None)
    assert log.filter(kills) and log.killed == {17}
    exit_line = logging.LogRecord("x", 40, "", 0, "failed (exitcode: %s) local_rank: 0", (2,), None)
    assert not log.filter(exit_line)


def test_the_trainer_constructs_the_checkpoint_manager_by_its_name():
    assert "self.checkpointer = CheckpointManager(" in inspect.getsource(titan_train.Trainer.__init__)
    manager = titan_checkpoint.CheckpointManager
    assert parameters(manager._should_save) == ["self", "curr_step", "last_step"]
    assert parameters(manager._states_to_load) == ["self", "model_only"]
    saving = inspect.getsource(manager.save)
    assert "self._should_save(curr_step, last_step)" in saving and "self._purge_stale_checkpoints()" in saving


def test_the_trainers_parts_that_our_loop_uses():
    """Calls that our `train` and `train_step` copy from torchtitan are still in its trainer."""
    trainer = titan_train.Trainer
    theirs = "".join(map(inspect.getsource, (trainer.train_step, trainer.train, trainer.forward_backward_step)))
    for call in (
        "self.optimizers.zero_grad()", "self.lr_schedulers.schedulers[0].get_last_lr()[0]", "self.train_context()",
        "self.maybe_enable_amp", "dist_utils.clip_grad_norm_(", "self.checkpointer.maybe_wait_for_staging()",
        "self.optimizers.step()", "self.lr_schedulers.step()", "self.gc_handler.run(self.step)",
        "dist_utils.set_pg_timeouts(", "maybe_enable_profiling(", "maybe_enable_memory_snapshot(",
    ):  # fmt: skip
        assert call in theirs, call


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_a_fused_optimizer_told_to_skip_changes_nothing(kind):
    cpu = torch.device("cpu")
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), torch.nan)
    optimizer = kind([weight], fused=True, weight_decay=0.5)
    assert supports_skip_flag(optimizer, cpu) and not supports_skip_flag(kind([weight], foreach=True), cpu)
    assert not supports_skip_flag(optimizer, torch.device("cuda"))
    with skip_if_flagged([optimizer], torch.tensor(1.0)):
        optimizer.step()
    assert torch.equal(weight, torch.ones(3)) and not any(x.any() for x in optimizer.state[weight].values())
    weight.grad = torch.ones(3)
    with skip_if_flagged([optimizer], torch.tensor(0.0)):
        optimizer.step()
    assert (weight < 1).all() and optimizer.state[weight]["step"] == 1


def test_the_step_line_is_logged_in_one_go():
    assert "tflops:" in inspect.getsource(titan_metrics.MetricsProcessor.log)
    assert titan_metrics.logger is logging.getLogger()


def test_special_tokens_come_from_the_tokenizers_configuration():
    assert parameters(HuggingFaceTokenizer._get_token_from_config) == ["self", "config", "key"]
    tokenizer = SimpleNamespace(config={"mask_token": {"content": "[M]", "__type": "AddedToken"}})
    tokenizer._get_token_from_config = lambda *a: HuggingFaceTokenizer._get_token_from_config(tokenizer, *a)
    assert titan_seam.special_token(tokenizer, "mask_token") == "[M]"


def test_a_missing_assets_path_is_warned_of_by_torchtitan_alone(caplog):
    caplog.set_level("WARNING")  # another test's command may have left a higher level

    def parse():
        ConfigManager().parse_args(["--model.hf_assets_path", "org/name"])
        return caplog.messages.count("HF assets path org/name does not exist!")

    with titan_seam.without_assets_warning():
        assert parse() == 0
    assert parse() == 1


def test_selective_checkpointing_has_a_list_of_operators():
    assert torch.ops.aten.mm.default in titan_seam.SAVED_OPERATORS


def test_streaming_numbers_its_shared_memory_by_a_function():
    assert "_each_prefix_int()" in inspect.getsource(shared_prefix._check_and_find)
    packed = shared_prefix._pack_locals(["/a", "/b"], 3)
    assert streaming_seam.registered_folders(packed) == ["/a", "/b"]
    assert streaming_seam.REGISTRATION == "locals" and len(streaming_seam.lock_files("000001_")) == 2


@pytest.fixture
def empty_memory():
    """Return a function that makes empty shared memory, as it is between its creator's shm_open and ftruncate."""
    files = []

    def make(name):
        files.append(Path("/dev/shm", name))
        files[-1].touch()
        return files[-1]

    yield make
    for file in files:
        file.unlink(missing_ok=True)


def test_streaming_opens_shared_memory_that_another_rank_is_creating(empty_memory):
    file = empty_memory(f"memdlm_dist_test_{os.getpid()}")
    with pytest.raises(ValueError, match="cannot mmap an empty file"):
        BuiltinSharedMemory(file.name)
    creator = threading.Timer(0.05, os.truncate, (file, 64))
    creator.start()
    opened = SharedMemory(file.name, size=64)
    assert opened.shm.size == 64 and opened.opened_shms == [opened.shm]
    opened.cleanup()
    creator.join()
    file.unlink()
    with pytest.raises(FileNotFoundError):
        SharedMemory(file.name, create=False)


def test_streaming_skips_a_prefix_whose_memory_stays_empty(empty_memory, monkeypatch):
    monkeypatch.setattr(streaming_seam, "_SIZE_PATIENCE", 0.0)
    first = os.getpid() * 1000
    monkeypatch.setattr(shared_prefix, "_each_prefix_int", lambda: itertools.count(first))
    file = empty_memory(f"{first}_{streaming_seam.REGISTRATION}")
    with pytest.raises(PermissionError, match="is empty, as a killed process leaves it"):
        SharedMemory(file.name, create=False)
    assert shared_prefix._check_and_find_retrying(["/a"], [None], streaming_seam.REGISTRATION, 0) == first + 1


def test_streaming_downloads_by_a_table_of_classes():
    for name in ("_client_identifier", "_validate_remote_path", "_download_file_impl", "clean_up"):
        assert hasattr(CloudDownloader, name), name
    assert streaming_seam.can_download("s3") == ("s3" in DOWNLOADER_MAPPINGS)
    assert "self._event" in inspect.getsource(StreamingDataset)
    assert "self._unique_rank_world" in inspect.getsource(StreamingDataset)
    assert len(streaming_seam.checksum("xxh64", b"x")) == 16


def test_streaming_flushes_a_shard_before_it_names_it(tmp_path):
    """Our writer moves each shard away as soon as `flush_shard` returns; later steps need only its index entry."""
    moved = []
    with ShardWriter(tmp_path / "out", Card(4, 9, 0, 1), 200, lambda path: moved.append(path.read_bytes())) as writer:
        plain = writer._writer.publish
        writer._writer.publish = lambda name: (plain(name), (tmp_path / "out" / name).unlink())
        for _ in range(20):
            writer.write(TrainingSequence(np.arange(4), np.ones(4, dtype=bool)))
    entries = json.loads((tmp_path / "out/index.json").read_text())["shards"]
    assert entries == writer.shards and len(entries) == len(moved) > 2
    assert [entry["raw_data"]["bytes"] for entry in entries] == [len(content) for content in moved]
    assert [entry["raw_data"]["hashes"]["xxh64"] for entry in entries] == [
        streaming_seam.checksum("xxh64", content) for content in moved
    ]


def test_streaming_merges_indices_in_the_order_in_which_they_are_given(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        shard = {"raw_data": {"basename": "s.mds"}, "zip_data": None, "samples": 1}
        (tmp_path / name / "index.json").write_text(json.dumps({"version": 2, "shards": [shard]}))
    streaming_seam.merge_indices([f"{tmp_path}/{name}/index.json" for name in ("b", "a")], str(tmp_path / "merged"))
    merged = json.loads((tmp_path / "merged/index.json").read_text())
    assert merged["version"] == 2
    assert [shard["raw_data"]["basename"] for shard in merged["shards"]] == ["b/s.mds", "a/s.mds"]


def test_joblib_raises_lokys_error_if_a_worker_ends():
    assert joblib_seam.WORKER_ENDED in TerminatedWorkerError.__mro__
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        assert list(joblib.Parallel(n_jobs=1, return_as="generator_unordered")([joblib.delayed(abs)(-1)])) == [1]
    assert LokyBackend.supports_return_generator and LokyBackend.supports_inner_max_num_threads


def test_dask_names_the_job_whose_workers_end():
    distributed = pytest.importorskip("distributed")
    assert {"key", "pure"} <= set(parameters(distributed.Client.submit))
    assert "loop" in parameters(distributed.as_completed.__init__) and issubclass(distributed.KilledWorker, Exception)


def test_the_harness_has_a_command_line_and_methods_for_token_ids():
    pytest.importorskip("lm_eval")
    from lm_eval.api.model import TemplateLM

    from memdlm_dist.compat import lm_eval as harness_seam

    assert hasattr(harness_seam.command_line(), "execute") and "lm_eval" in sys.modules
    assert "_loglikelihood_tokens" in TemplateLM.__abstractmethods__
    assert "self._loglikelihood_tokens(" in inspect.getsource(TemplateLM.loglikelihood)
    assert "self._encode_pair(" in inspect.getsource(TemplateLM.loglikelihood)


def test_collectives_are_counted_by_the_recorder_of_the_backend(monkeypatch):
    """NCCL's flight recorder takes precedence; it exists only in CUDA builds."""
    module = torch._C._distributed_c10d
    status = {str(group): {"last_enqueued_collective": 9 - group, "last_completed_collective": 5} for group in (0, 1)}
    monkeypatch.setattr(module, "_dump_nccl_trace_json", lambda *_: json.dumps({"pg_status": status}), raising=False)
    assert torch_seam.collectives() == [(9, 5), (8, 5)]
    monkeypatch.setattr(module, "_dump_nccl_trace_json", lambda *_: "{}")
    monkeypatch.setattr(module, "_dump_fr_trace_json", lambda *_: json.dumps({"pg_status": {"0": status["1"]}}))
    assert torch_seam.collectives() == [(8, 5)]


def test_a_flag_that_older_torchruns_lack():
    parser = run.get_args_parser()
    assert torchrun.shutdown_flags(parser, 5) == ["--shutdown-timeout=5"]
    assert torchrun.shutdown_flags(argparse.ArgumentParser(), 5) == []


def test_gradients_are_plain_sums_for_nvls_and_gloo():
    """Forced sum reduction makes FSDP2 use plain sums without a division.

    torchtitan sets FSDP2's divisor to 1, for which FSDP2 otherwise uses a pre-multiplied sum.
    """
    group = SimpleNamespace(size=lambda: 8)
    factors = fsdp_collectives._get_gradient_divide_factors(group, None, torch.float32, "cuda", 1.0, True)
    assert factors == (None, 1.0, dist.ReduceOp.SUM, dist.ReduceOp.SUM)
    _, _, unforced, _ = fsdp_collectives._get_gradient_divide_factors(group, None, torch.float32, "cuda", 1.0)
    assert unforced != dist.ReduceOp.SUM
    gradient = torch.randn(3)
    before = gradient.clone()
    fsdp_collectives._div_if_needed(gradient, 1.0)
    assert torch.equal(gradient, before)


def test_dcps_process_has_a_body_and_a_name():
    executor = torch_seam._async_process_executor
    assert parameters(torch_seam._SaverProcess._checkpointing_subprocess) == ["pg_init_info", "parent_conn"]
    source = inspect.getsource(executor)
    assert "target=self._checkpointing_subprocess" in source
    assert "_CHECKPOINT_PROCESS = _AsyncCheckpointProcess(" in source


def test_safetensors_are_consolidated_after_their_headers_are_written(tmp_path):
    """Shards of two ranks become one file with the format in its header; torch's own header lacks it."""
    x = torch.arange(12.0).reshape(4, 3)
    for rank, rows in enumerate((x[:1], x[1:])):
        sharding = {"x": {"saved_offsets": [rank, 0]}}
        metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(sharding)}
        save_file({"x": rows.contiguous()}, tmp_path / f"shard-{rank}.safetensors", metadata=metadata)
    out = tmp_path / "out"
    out.mkdir()
    torch_seam.consolidate_safetensors(str(tmp_path), str(out), {"x": "model.safetensors"})
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"} and torch.equal(file.get_tensor("x"), x)
    source = inspect.getsource(torch_seam._consolidate_hf_safetensors._consolidate_safetensors_files)
    assert source.index("_write_metadata(output_files_data)") < source.index("_write_data(")


def test_torchao_shards_nf4_as_assumed():
    """Rows of a quantised tensor are slices of three tensors; two more belong to the whole tensor."""
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    whole = torchao.quantize(weight)
    assert torchao.is_nf4(whole) and not torchao.is_nf4(weight)
    shard = torchao.quantize(torch.empty(64, 256, device="meta"))
    shard = torch.empty_like(shard, device="cpu")  # what Module.to_empty does
    torchao.materialize(shard)
    torchao.write_rows(shard, whole, 128)
    assert torch.equal(torchao.dequantize(shard), torchao.dequantize(whole)[128:192])
    assert (torchao.dequantize(whole) - weight).abs().mean() < 0.1 * weight.abs().mean()
    # Half a byte, an int8 scale for 64 elements, a factor for 256 scales; mean and values of the type.
    assert torchao.stored_bytes(shard) == 64 * 256 // 2 + 256 + 4 + 4 + 16 * 4


@pytest.mark.parametrize("granularity", [1, 7])
def test_streaming_draws_the_same_samples_without_its_loop(granularity):
    assert parameters(streaming_dataset.get_sampling) == parameters(get_sampling)
    assert "get_sampling(" in inspect.getsource(StreamingDataset.resample_streams)
    random = np.random.default_rng(0)
    for epoch in range(20):
        samples = random.integers(1, 50, random.integers(1, 30))
        for choose in (0, 1, samples.sum(), *random.integers(0, 3 * samples.sum(), 5)):
            arguments = samples, int(choose), granularity, 11, epoch, bool(epoch % 2)
            ours, theirs = streaming_dataset.get_sampling(*arguments), get_sampling(*arguments)
            assert np.array_equal(ours, theirs) and ours.sum() == choose and ours.dtype == theirs.dtype
