# Sourced by quickstart.sh and test.sh: makes .venv with requirements.txt in it, once, and sets $python.
# SDN_PYTHON=/path/to/python uses that interpreter and installs nothing.
if [ -n "${SDN_PYTHON:-}" ]; then
    python=$SDN_PYTHON
else
    python=.venv/bin/python
    if ! cmp -s requirements.txt .venv/installed-requirements.txt; then
        echo "installing requirements.txt into .venv (several GB with torch's CUDA build; a few minutes) ..."
        [ -x "$python" ] || python3 -m venv .venv
        "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
        cp requirements.txt .venv/installed-requirements.txt
    fi
fi
