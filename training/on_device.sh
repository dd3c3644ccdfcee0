#!/usr/bin/env bash
# One training run on a GPU machine that has PyTorch but no simulator: wheels in .whl, OpenGL loaders in .gl.
# usage: OUT=folder training/on_device.sh <arguments of train.py>; the checkpoint comes back in pieces of 15 MB.
set -u
export PYTHONUNBUFFERED=1 PYTHONPATH=/tmp/site:$PWD/ros_ws/src/hybrid_policy
for deb in .gl/*.deb; do dpkg -x "$deb" /; done
ldconfig
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl || exit 1
ls /usr/local/nvidia/share/glvnd/egl_vendor.d/ 2>/dev/null
nvidia-smi --query-gpu=name --format=csv,noheader; nproc
python3 training/train.py --out /tmp/run "$@" 2>&1 | tee "$OUT/log.txt"
cp /tmp/run/figures.json /tmp/run/curve.csv "$OUT/" 2>/dev/null
if [ -f /tmp/run/checkpoint/model.safetensors ]; then
  split -b 15M /tmp/run/checkpoint/model.safetensors "$OUT/parts."
  tar -C /tmp/run --exclude=model.safetensors -czf "$OUT/rest.tar.gz" checkpoint grounding.pt
fi
