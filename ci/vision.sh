#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The tests that need timm, which needs torchvision, which fits one version of torch alone: in an
# environment of their own, on libraries that are built already. A package that is missing fails.
# Usage: ci/vision.sh FOLDER    HEADWORKS_LIBRARY_DIR: the libraries, built for the same Python;
#        PYTHON: the interpreter that the environment is made with; an environment there is used
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1

if [ ! -x "$folder/bin/python" ]; then
  "${PYTHON:-python3}" -m venv "$folder"
  "$folder/bin/python" -m pip install -q torch==2.14.1 torchvision==0.29.1 timm==1.0.31 \
    numpy pytest pytest-xdist scikit-learn
fi

# What the tests would be skipped for.
"$folder/bin/python" -c 'import sklearn.datasets, timm.models.efficientvit_msra, torchvision'
PYTHONPATH=$PWD/python "$folder/bin/python" -m pytest -q -n auto -p no:cacheprovider tests/test_timm*.py
