#!/usr/bin/env bash
# A hosted notebook from nothing, as on Colab: run by hand, for it downloads packages (five minutes and more).
#   tests/course/colab.sh [FOLDER [NOTEBOOK ...]]      PYTHON=... names a Python that has papermill
# A Python of its own holds the host's torch, numpy, pandas and kernel, and `google.colab`; the home is
# empty, the working folder is not the course's, and COURSE_REPO leads to a clone of the last commit.
# Each notebook must pass at smoke scale, and what the host brought must be what it was.
set -euo pipefail

course=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$course/.venv/bin/python}
work=${1:-$(mktemp -d)}
shift || true
notebooks=("${@:-00_start_here}")
host=$work/host
watched="torch|numpy|pandas|ipykernel"

if [ ! -x "$host/bin/python" ]; then
  "$python" -m venv "$host"
  torch=$("$python" -c 'from importlib.metadata import version; print(version("torch").partition("+")[0])')
  # numpy and pandas of other versions than the course's own pins: theirs must stay
  "$host/bin/python" -m pip install --quiet "torch==$torch" "numpy<2.4.6" "pandas<3.1" ipykernel
fi
"$host/bin/python" -m pip uninstall --quiet --yes learning-from-feedback 2>/dev/null  # of a run before
site=$("$host/bin/python" -c 'import site; print(site.getsitepackages()[0])')
mkdir -p "$site/google/colab" && touch "$site/google/colab/__init__.py"
"$host/bin/python" -m ipykernel install --prefix "$work/jupyter" --name colab >/dev/null 2>&1

rm -rf "$work/home" "$work/content" "$work/origin"
mkdir -p "$work/home" "$work/content"
git clone --quiet --no-local "$course" "$work/origin"
brought=$("$host/bin/python" -m pip list --format freeze | grep -E "^($watched)==")
echo "the host brings:" $brought

cd "$work/content"
for name in "${notebooks[@]}"; do
  cp "$course/notebooks/$name.ipynb" "copy_of_$name.ipynb"
  env -u PYTHONPATH -u VIRTUAL_ENV -u FEEDBACK_CACHE -u FEEDBACK_DATA -u FEEDBACK_ROOT -u FEEDBACK_RUN_DIR \
    HOME="$work/home" JUPYTER_PATH="$work/jupyter/share/jupyter" COURSE_REPO="file://$work/origin" \
    "$python" -m papermill --kernel colab --no-progress-bar --log-output \
    "copy_of_$name.ipynb" "$name-executed.ipynb" -p SCALE smoke
done

after=$("$host/bin/python" -m pip list --format freeze | grep -E "^($watched)==")
[ "$brought" = "$after" ] || { echo "changed: $after"; exit 1; }
echo "passed: ${notebooks[*]}; kept as they were:" $after
