#!/usr/bin/env bash
# Sets up everything that `make run` and `make test` need, once; quick when it is there already.
#   setup.sh run    what the robot, the simulator and the evaluation need
#   setup.sh dev    the same, and the tests' and linters' tools
# PYTHON chooses the interpreter (3.10 to 3.13), TORCH_INDEX_URL where torch comes from.
set -euo pipefail
cd "$(dirname "$0")"
PATH=$PATH:/usr/sbin:/sbin  # ldconfig is there, and not on every user's PATH
what=${1:-run}
python=${PYTHON:-python3}
venv=.venv
package=ros_ws/src/hybrid_policy

say() { printf '%s\n' "setup: $*"; }

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

# apt_install REASON PACKAGE...
apt_install() {
  local reason=$1; shift
  if ! command -v apt-get >/dev/null; then
    say "$reason: please install ${*} with your system's package manager"; exit 1
  fi
  say "installing ${*} with apt-get, because $reason"
  as_root env DEBIAN_FRONTEND=noninteractive sh -c "apt-get install -y -qq $* >/dev/null 2>&1 ||
    { apt-get update -qq && apt-get install -y -qq $* >/dev/null; }"
}

"$python" - <<'PY' || exit 1
import sys
if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"setup: Python {sys.version.split()[0]} given, expected 3.10 to 3.13: set PYTHON=python3.x")
PY

# The stamp changes when anything that decides what is installed does.
stamp=$( (cat setup.sh constraints.txt $package/setup.py; "$python" -V; echo "${ROS_DISTRO:-}") | cksum | cut -d' ' -f1)
done_for() { [ -f "$venv/.setup-$1-$stamp" ]; }
if done_for "$what" || { [ "$what" = run ] && done_for dev; }; then exit 0; fi

"$python" -c 'import ensurepip, venv' 2>/dev/null || apt_install "Python's venv module is missing" python3-venv

# A distribution's ROS 2 is used as it is; without one, ROS 2 comes as wheels from PyPI.
extras=sim,eval
site=()
if [ -n "${ROS_DISTRO:-}" ] && "$python" -c 'import rclpy' 2>/dev/null; then
  say "using the sourced ROS 2 ($ROS_DISTRO)"
  site=(--system-site-packages)
else
  [ "$(uname -m)" = x86_64 ] || { say "no ROS 2 is sourced, and its wheels are for x86_64 only: install ROS 2 and source its setup.bash"; exit 1; }
  extras=$extras,ros
fi
[ "$what" = dev ] && extras=$extras,dev

if [ ! -x "$venv/bin/python" ]; then
  say "making a virtual environment in $venv"
  "$python" -m venv ${site[@]+"${site[@]}"} "$venv"
fi
touch "$venv/COLCON_IGNORE"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

say "installing hybrid_policy[$extras] and its pinned dependencies into $venv (minutes the first time)"
pip install -q -c constraints.txt --upgrade pip setuptools wheel
if [ -n "${TORCH_INDEX_URL:-}" ]; then
  pip install -q -c constraints.txt --index-url "$TORCH_INDEX_URL" torch
else
  pip install -q -c constraints.txt torch
fi
# The warning is of folders beside the package that bear its name: there are none, and it reads like an error.
PYTHONWARNINGS="ignore:Editable installation" pip install -q -c constraints.txt --no-build-isolation -e "$package[$extras]"
# gym-aloha: only its MJCF and meshes are used; its own dependencies (dm_control and more) are not.
pip install -q -c constraints.txt --no-deps gym-aloha

# MuJoCo renders without a display through OSMesa or EGL.
if ! ldconfig -p 2>/dev/null | grep -q 'libOSMesa\.so'; then
  if ! ldconfig -p 2>/dev/null | grep -q 'libEGL_\(mesa\|nvidia\)'; then
    apt_install "MuJoCo draws the cameras' images without a display through it" libosmesa6
  fi
fi
rm -f "$venv"/.setup-"$what"-*
touch "$venv/.setup-$what-$stamp"
say "done"
