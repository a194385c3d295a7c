"""`benchmarks.kernel_schedule`: reading a compiler's dump; one real compile."""

import importlib.util
import json

import pytest

from benchmarks import kernel_schedule

UTILIZATION = """== CAPACITY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
4 3 0 0 1 0 0 1 1 0
1 0 4 0 0 3 2 0 0 0
0 1 1 0 0 1 1 0 0 1
"""


def dump(folder, name, bundles, order):
  text = (
      "Schedule analysis:\n\tempty scheduled bundles:    8\n"
      f"\tnon empty scheduled bundles: {bundles}\n"
  )
  stem = f"17955{order}-{name}"
  (folder / f"{stem}-71-schedule-analysis_final_bundles.txt").write_text(text)
  use = f"{stem}-70-final_hlo-static-per-bundle-utilization.txt"
  (folder / use).write_text(UTILIZATION)


def test_what_the_compiler_wrote(tmp_path):
  dump(tmp_path, "jvp_attention_fused.1", 6, 1)
  dump(tmp_path, "jvp_attention_backward_rows.2", 7, 2)
  dump(tmp_path, "flash_attention_kernel.1", 8, 3)
  dump(tmp_path, "fusion.3", 9, 4)
  found = kernel_schedule.read_schedules(tmp_path)
  assert {k: row["bundles"] for k, row in found.items()} == {
      "fused": 6, "backward_rows": 7, "jax": 8,
  }  # fmt: skip
  # Sums of the columns over what fits in a bundle, rounded up.
  assert found["fused"] == {
      "bundles": 6, "MXU": 2, "XLU": 2, "VALU": 2, "VPOP": 0, "EUP": 1,
      "VLOAD": 2, "VLOAD:FILL": 3, "VSTORE": 1, "VSTORE:SPILL": 1, "SALU": 1,
  }  # fmt: skip


def test_without_the_compiler_it_is_one_line(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(SystemExit) as info:
    kernel_schedule.main(["--kernel", "forward"])
  text = str(info.value)
  assert "\n" not in text
  assert text.startswith("kernel_schedule: libtpu must be installed, got none")


@pytest.mark.parametrize(
    "flags,expected",
    [
        (["--kernel", "forwards"], "--kernel must be of forward, jax, fused"),
        (["--chip", "v5x"], "--chip must be of v5e, v5p, v6e, got v5x"),
        (["--tile", "512"], "--tile: must be rows x columns, as 512x1024"),
        (["--tile", "512x100"], "multiples of 128, got 512x100"),
    ],
)
def test_bad_flags(flags, expected, monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
  with pytest.raises(SystemExit):
    kernel_schedule.main(flags)
  last = capsys.readouterr().err.splitlines()[-1]
  assert expected in last


def test_a_row_of_the_table():
  row = {
      "chip": "v5e", "kernel": "fused", "tile": [512, 1024], "bundles": 6000,
      "per_512x512": 3000.0, "binding": "MXU", "share": 0.85, "MXU": 5100,
      "XLU": 1, "VALU": 2, "EUP": 3, "VLOAD": 4, "VSTORE": 5,
      "VSTORE:SPILL": 6, "VLOAD:FILL": 7,
  }  # fmt: skip
  assert kernel_schedule.line(row).split() == [
      "v5e", "fused", "512x1024", "6000", "3000", "5100", "1", "2", "3", "4",
      "5", "6", "7", "MXU", "85.0%",
  ]  # fmt: skip


@pytest.mark.aot
def test_a_setting_and_one_that_is_refused(tmp_path, capsys):
  pytest.importorskip("libtpu", reason="needs the extra plan")
  path = tmp_path / "table.json"
  # JAX's own kernel wants a length that its blocks divide.
  flags = ["--kernel", "forward,jax", "--length", "1280", "--tile", "256x512"]
  with pytest.raises(SystemExit):
    kernel_schedule.main([*flags, "--json", str(path)])
  (row,) = json.loads(path.read_text())
  assert row["tile"] == [256, 512] and row["kernel"] == "forward"
  assert row["bundles"] >= row[row["binding"]] > 0
  # Half of 512x512.
  assert row["per_512x512"] == 2 * row["bundles"]
  out, err = capsys.readouterr()
  assert len(out.splitlines()) == 2
  (line,) = [a for a in err.splitlines() if a.startswith("kernel_schedule")]
  assert "v5e jax 256x512: ValueError: " in line
