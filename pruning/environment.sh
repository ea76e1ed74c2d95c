# Sourced by the two scripts: sets PYTHON. An active environment or a PYTHON that is
# already set is used as it is; otherwise .venv is made, and filled when REQUIREMENTS change.
# REQUIREMENTS: the files to install from, relative to the repository root.

if [ -z "${PYTHON:-}" ]; then
  if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    PYTHON=python
  else
    PYTHON="$root/.venv/bin/python"
    for file in $REQUIREMENTS; do
      # The copy beside the environment says what was installed to the end.
      installed="$root/.venv/installed-$(echo "$file" | tr / -)"
      cmp -s "$root/$file" "$installed" && continue
      if [ ! -x "$PYTHON" ]; then
        echo "making .venv and installing $file (once, some minutes)" >&2
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
  torch diffusers transformers accelerate torch_fidelity lpips pycocotools pooch matplotlib || exit 2
