# Sets PYTHON for the scripts that source this file. A PYTHON that is already set and an active
# environment are used as they are. Otherwise PYTHON is that of .venv in the repository root: the first
# run makes .venv, and packages are installed into it whenever a file in REQUIREMENTS has changed.
# REQUIREMENTS: names of requirements files, relative to the repository root, which is $root.

if [ -z "${PYTHON:-}" ]; then
  if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    PYTHON=python
  else
    PYTHON="$root/.venv/bin/python"
    for file in $REQUIREMENTS; do
      # A copy of the file in .venv says that everything in it has been installed.
      installed="$root/.venv/installed-$(echo "$file" | tr / -)"
      cmp -s "$root/$file" "$installed" && continue
      if [ ! -x "$PYTHON" ]; then
        echo "making .venv and installing $file (only once; this takes some minutes)" >&2
        python3 -m venv "$root/.venv" || { echo "error: python3 -m venv failed; install python3 with its venv module" >&2; exit 2; }
      fi
      "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$root/$file" >&2 ||
        { echo "error: could not install $file into .venv; see pip's message above" >&2; exit 2; }
      cp "$root/$file" "$installed"
    done
  fi
fi
"$PYTHON" -c 'import importlib.util as u, sys
missing = [m for m in sys.argv[1:] if u.find_spec(m) is None]
sys.exit("error: this environment lacks " + ", ".join(missing) + "; run: pip install -r requirements.txt" if missing else 0)' \
  torch diffusers transformers accelerate torch_fidelity torchmetrics lpips pycocotools pooch tabulate jinja2 matplotlib || exit 2
