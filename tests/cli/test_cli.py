"""`milepost ls | show | verify | diff | convert | prune` on checkpoints of ours, of torch and of safetensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from milepost import Checkpointer
from milepost.cli.main import main
from milepost.plugins import SnapshotCheckpointIO, TorchCheckpointIO


def state(step: int) -> dict[str, Any]:
    torch.manual_seed(0)
    weights = {"layer.weight": torch.randn(3, 4) + step, "half": torch.ones(5).bfloat16(), "idle": torch.zeros(2)}
    return {
        "global_step": step, "epoch": step // 10, "state_dict": weights, "optimizer_states": [{"lr": 0.1 * step}],
        "pytorch-lightning_version": "2.6.6",
    }  # fmt: skip


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """A directory and a file of step 10, and of step 20."""
    for step in (10, 20):
        TorchCheckpointIO().save_checkpoint(state(step), tmp_path / f"a-{step}.ckpt")
        SnapshotCheckpointIO(background=False).save_checkpoint(state(step), tmp_path / f"b-{step}")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    status = main([str(a) for a in arguments])
    out = capsys.readouterr()
    return status, out.out + out.err


def as_json(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Any:
    _, out = run(capsys, *arguments, "--json")
    return json.loads(out)


def test_ls_lists_both_forms(both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = as_json(capsys, "ls", both)
    assert [(Path(r["path"]).name, r["form"], r["step"]) for r in rows] == [
        ("a-10.ckpt", "ckpt", 10), ("b-10", "directory", 10), ("a-20.ckpt", "ckpt", 20), ("b-20", "directory", 20),
    ]  # fmt: skip
    status, out = run(capsys, "ls", both)
    assert status == 0 and len(out.splitlines()) == 5 and "b-20" in out


def test_ls_shows_metrics_and_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"n": 1}, {"loss": 0.25}, wait=True)
        checkpointer.save(2, {"n": 2}, wait=True)
    head = tmp_path / "step-00000002" / "manifest.json"
    head.chmod(0o644)
    head.write_text(head.read_text().replace('"step":2', '"step":3'))
    _, out = run(capsys, "ls", tmp_path)
    assert "loss=0.25" in out and "does not match its own digest" in out


@pytest.mark.parametrize("name", ["a-10.ckpt", "b-10"])
def test_show(both: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    shown = as_json(capsys, "show", both / name)
    assert shown["step"] == 10 and shown["epoch"] == 1
    assert shown["tensors"]["state_dict.layer.weight"] == {"dtype": "F32", "shape": [3, 4], "size_bytes": 48}
    assert shown["tensors"]["state_dict.half"]["dtype"] == "BF16"
    assert shown["values"]["optimizer_states.0.lr"] == "1.0"
    status, out = run(capsys, "show", both / name)
    assert status == 0 and "state_dict.layer.weight" in out and "[3, 4]" in out


def test_show_what_others_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    strided = torch.arange(16.0).reshape(4, 4)[:, 1:3]
    everything = {
        "w": torch.nn.Parameter(torch.ones(2)),
        "s": strided,
        "u": torch.ones(2, dtype=torch.uint16),
        "o": object,
    }
    torch.save(everything, tmp_path / "t.pt")
    save_file({"w": torch.ones(2, 2)}, tmp_path / "s.safetensors", metadata={"by": "me"})
    assert as_json(capsys, "show", tmp_path / "t.pt")["tensors"]["s"]["shape"] == [4, 2]
    assert as_json(capsys, "show", tmp_path / "s.safetensors")["values"] == {"__metadata__.by": "me"}
    assert {r["form"] for r in as_json(capsys, "ls", tmp_path)} == {"safetensors", "ckpt"}


def damage(path: Path) -> None:
    target = path / "state_dict.safetensors" if path.is_dir() else path
    target.chmod(0o644)
    data = bytearray(target.read_bytes())
    place = data.find(torch.ones(5).bfloat16().view(torch.uint8).numpy().tobytes())
    data[place] ^= 1
    target.write_bytes(data)


@pytest.mark.parametrize("name", ["a-10.ckpt", "b-10"])
def test_verify_names_what_is_damaged(both: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert run(capsys, "verify", both)[0] == 0
    damage(both / name)
    status, out = run(capsys, "verify", both)
    assert status == 1 and out.count("sound") == 3 and "half" in out
    (row,) = [r for r in as_json(capsys, "verify", both) if r["state"] == "damaged"]
    assert Path(row["path"]).name == name and len(row["byte_range"]) == 2


@pytest.mark.parametrize("left", ["its first half", "nothing", "zeros"])
def test_what_a_crash_left_of_a_file_is_damaged_and_not_passed_over(
    both: Path, capsys: pytest.CaptureFixture[str], left: str
) -> None:
    torn = both / "a-20.ckpt"
    data = torn.read_bytes()
    torn.write_bytes({"its first half": data[: len(data) // 2], "nothing": b"", "zeros": bytes(len(data))}[left])
    status, out = run(capsys, "verify", both)
    assert status == 1 and f"{torn}: damaged" in out and out.count("sound") == 3
    assert run(capsys, "verify", torn)[0] == 1
    (row,) = [row for row in as_json(capsys, "ls", both) if row["error"]]
    assert row["path"] == str(torn)
    found = as_json(capsys, "prune", both, "--keep-newest", 1, "--yes")
    assert str(torn) in found["kept"] and str(both / "b-20") in found["kept"]


def test_a_file_of_another_kind_is_no_checkpoint(both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = both / "compressed.ckpt"  # a plugin's own
    other.write_bytes(b"\x1f\x8b" + bytes(50))
    assert len(as_json(capsys, "ls", both)) == 4
    status, out = run(capsys, "verify", other)
    assert status == 2 and "is no checkpoint" in out


def test_ls_takes_from_the_index_what_the_checkpoint_does_not_tell(
    both: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"path": "b-10", "epoch": 7, "metrics": {"loss": 0.5}}
    (both / "index.json").write_text(json.dumps({"version": 1, "checkpoints": [record]}))
    rows = {Path(row["path"]).name: row for row in as_json(capsys, "ls", both)}
    assert (rows["b-10"]["epoch"], rows["b-10"]["metrics"]) == (7, {"loss": 0.5})
    assert rows["b-20"]["epoch"] is None


def test_verify_says_what_it_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "s.safetensors")
    status, out = run(capsys, "verify", tmp_path / "s.safetensors")
    assert status == 0 and "not verifiable" in out


@pytest.mark.parametrize(("one", "other"), [("a-10.ckpt", "b-20"), ("b-10", "a-20.ckpt"), ("b-10", "b-20")])
def test_diff_says_what_changed_and_by_how_much(
    both: Path, capsys: pytest.CaptureFixture[str], one: str, other: str
) -> None:
    changes = {c["name"]: c for c in as_json(capsys, "diff", both / one, both / other)}
    assert changes["state_dict.layer.weight"]["largest"] == pytest.approx(10.0)
    assert changes["state_dict.layer.weight"]["differing"] == 12
    assert "state_dict.half" not in changes and "state_dict.idle" not in changes
    assert changes["optimizer_states.0.lr"]["to"] == "2.0"
    assert run(capsys, "diff", both / one, both / other)[0] == 1


def test_equal_in_another_form_is_equal(both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "diff", both / "a-10.ckpt", both / "b-10") == (0, "equal\n")


def test_convert_there_and_back(both: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "convert", both / "a-10.ckpt", tmp_path / "c")[0] == 0
    assert run(capsys, "convert", tmp_path / "c", tmp_path / "d.ckpt")[0] == 0
    assert run(capsys, "diff", both / "a-10.ckpt", tmp_path / "d.ckpt") == (0, "equal\n")
    assert run(capsys, "convert", tmp_path / "c", tmp_path / "w.safetensors")[0] == 0
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(weights[k], v) for k, v in state(10)["state_dict"].items())
    assert run(capsys, "convert", tmp_path / "w.safetensors", tmp_path / "e.ckpt")[0] == 0
    loaded = torch.load(tmp_path / "e.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(loaded[k], v) for k, v in state(10)["state_dict"].items())
    status, out = run(capsys, "convert", both / "a-10.ckpt", tmp_path / "c")
    assert status == 2 and "exists already" in out


def test_convert_refuses_what_would_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"w": torch.ones(1)}, "odd": print}, tmp_path / "t.pt")
    status, out = run(capsys, "convert", tmp_path / "t.pt", tmp_path / "d")
    assert status == 2 and "odd" in out and not (tmp_path / "d").exists()


def test_prune_lists_then_removes_and_trusts_no_damaged_one(both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(both / "b-20")
    status, out = run(capsys, "prune", both, "--keep-newest", 1)
    assert status == 0 and "nothing was done" in out and len(list(both.iterdir())) == 4
    found = as_json(capsys, "prune", both, "--keep-newest", 1, "--yes")
    assert sorted(Path(p).name for p in found["removed"]) == ["a-10.ckpt", "b-10"]
    assert sorted(p.name for p in both.iterdir()) == ["a-20.ckpt", "b-20"]
    for arguments in ([], ["--keep-best", 1]):
        assert run(capsys, "prune", both, *arguments)[0] == 2


def test_names_do_no_harm_to_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J"
    SnapshotCheckpointIO(background=False).save_checkpoint({evil: {evil: torch.ones(1), "v": evil}}, tmp_path / evil)
    for command in (["ls", tmp_path], ["show", tmp_path / evil], ["verify", tmp_path]):
        status, out = run(capsys, *command)
        assert status == 0 and "owned" in out and "\x1b" not in out and "\x07" not in out


def test_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("ls", "show", "verify"):
        status, out = run(capsys, command, tmp_path / "absent")
        assert status == 2 and "absent" in out
    (tmp_path / "no.txt").write_text("no")
    assert run(capsys, "show", tmp_path / "no.txt")[0] == 2
    assert run(capsys, "ls", tmp_path) == (0, "no checkpoints\n")


def test_the_commands_run_without_torch_and_ls_imports_little(both: Path) -> None:
    code = """
import sys
sys.modules["torch"] = None
from milepost.cli.main import main
status = main(sys.argv[1:])
print(sorted({"numpy", "rich", "typer", "concurrent.futures.process"} & set(sys.modules)), file=sys.stderr)
sys.exit(status)"""
    for command in (
        ["show", both / "b-10"],
        ["verify", both],
        ["diff", both / "a-10.ckpt", both / "b-10"],
        ["ls", both],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert done.stderr == "[]\n"
