"""Medians of several functions timed in turn, in one process: what else the machine does falls on all of them alike."""

import ctypes
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

torch.set_num_threads(1)


def medians(*functions: Callable[[], object], rounds: int = 9) -> list[float]:
    """Median seconds of each function, after one run of each that is not counted."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def peak_megabytes(name: str) -> float:
    """
    Resident memory that `python THIS_SCRIPT --peak NAME` adds while it runs, in MB.

    The script answers `--peak` by calling [`report_peak`] with the function of that name. Its allocator gives every large
    block back when it is freed, so that what is counted was in use.
    """
    command = [sys.executable, sys.argv[0], "--peak", name]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


def report_peak(function: Callable[[], object]) -> None:
    """Prints how many MB above what is resident now `function` takes at its peak (Linux keeps the mark)."""
    function()  # what the libraries load and keep for good is not counted
    ctypes.CDLL(None).malloc_trim(0)  # nor counted in favour: what was freed goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = _status("VmRSS")
    function()
    print((_status("VmHWM") - before) / 1024)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
