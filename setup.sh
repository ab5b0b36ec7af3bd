# Sourced by quickstart.sh and test.sh: makes .venv with the packages of $requirements in it, once,
# and sets $python. SDN_PYTHON=/path/to/python uses that interpreter and installs nothing.
requirements=${requirements:-requirements.txt} # names of files, separated by spaces
if [ -n "${SDN_PYTHON:-}" ]; then
    python=$SDN_PYTHON
else
    python=.venv/bin/python
    for file in $requirements; do
        if ! cmp -s "$file" ".venv/installed-$file"; then
            echo "installing $file into .venv (requirements.txt: several GB with torch's CUDA build; a few minutes) ..."
            [ -x "$python" ] || python3 -m venv .venv
            "$python" -m pip install --quiet --disable-pip-version-check -r "$file"
            cp "$file" ".venv/installed-$file"
        fi
    done
fi
