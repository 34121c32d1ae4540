import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step.py"


def test_a_small_benchmark_prints_its_row():
    options = "--models linear --contenders hce_jax --genes 40 --types 5 --batch_size 16 --steps 2".split()
    result = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=True)
    rows = [line.split()[:2] for line in result.stdout.splitlines()]
    assert rows[-1] == ["linear", "hce_jax"]
