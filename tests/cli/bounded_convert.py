"""Converts with a limit on the memory that is not a file's: argv is source, target, memory for tensors, limit."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch  # noqa: F401  # what it takes is no part of the limit

import milepost.engine.directory
import milepost.plugins.io.torch_io  # noqa: F401
from milepost.cli.converting import convert

source, target, memory, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
now = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line)
resource.setrlimit(resource.RLIMIT_DATA, (1024 * now + limit, resource.RLIM_INFINITY))
convert(source, target, memory_bytes=memory, quiet=True)
