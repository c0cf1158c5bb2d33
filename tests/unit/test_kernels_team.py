"""The threads of a step: what one of them throws reaches the caller, and none is left waiting."""

import shutil
import subprocess
from pathlib import Path

import pytest

import trinity.kernels

PROGRAM = """
#include <cstdio>
#include <stdexcept>

#include "team.h"

int main() {
  int caught = 0, whole = 0;
  for (int failing = 0; failing < 60; ++failing) {
    trinity::Team team;
    std::atomic<int> done{0};
    // Fails in a task, in what follows a phase, or (from 45 on) not at all.
#pragma omp parallel num_threads(3)
    team.join([&](trinity::Team::Member& member) {
      for (int phase = 0; phase < 5; ++phase) {
        member.share(8, [&](int64_t task) {
          if (phase * 8 + task == failing) throw std::runtime_error("a task");
          ++done;
        }, [&] {
          if (phase == failing - 40) throw std::runtime_error("what follows");
        });
      }
    });
    try {
      team.check();
      whole += done == 40;
    } catch (const std::runtime_error&) {
      ++caught;
    }
  }
  std::printf("%d %d", caught, whole);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_a_member_that_fails_ends_the_step_of_all(tmp_path: Path):
    (tmp_path / "team.cpp").write_text(PROGRAM)
    headers = Path(trinity.kernels.__file__).parent
    build = ["g++", "-std=c++20", "-O1", "-fopenmp", f"-I{headers}", "team.cpp", "-o", "team"]
    subprocess.run(build, cwd=tmp_path, check=True, timeout=60)
    ran = subprocess.run([tmp_path / "team"], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == "45 15"
