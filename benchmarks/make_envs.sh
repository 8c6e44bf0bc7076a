#!/bin/sh
# Make the environments of contenders that cannot share ours, in benchmarks/.envs: llama-factory (for bench.py) and soup
# (for methods.py).
# usage: benchmarks/make_envs.sh [llama-factory] [soup]     (both if none is named; PYTHON=python3.11 to choose; about
#        3 and 2 GB, once; delete a folder to make it anew)
set -eu
cd "$(dirname "$0")"

begin() {
    rm -rf "$1"
    ${PYTHON:-python3} -m venv "$1"
}

llama_factory() {
    env=.envs/llama-factory
    begin $env
    pip="$env/bin/python -m pip --quiet --disable-pip-version-check"
    $pip install torch==2.13.0 llamafactory==0.9.5
    # Text needs neither vision nor audio, and their wheels may be built for another torch: an absent torchvision is
    # handled by its users; torchaudio is imported by name, so an empty package stands in for it.
    $pip uninstall --yes torchvision torchaudio
    site=$($env/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    mkdir -p "$site/torchaudio" "$site/torchaudio-2.13.0.dist-info"
    : > "$site/torchaudio/__init__.py"
    printf 'Metadata-Version: 2.1\nName: torchaudio\nVersion: 2.13.0\nSummary: empty stand-in\n' > "$site/torchaudio-2.13.0.dist-info/METADATA"
    $env/bin/python -c 'import llamafactory, torch, transformers, trl; print("llamafactory 0.9.5 with torch", torch.__version__, "transformers", transformers.__version__, "trl", trl.__version__)'
    touch $env/done
}

soup() {
    env=.envs/soup
    begin $env
    $env/bin/python -m pip --quiet --disable-pip-version-check install torch==2.13.0 'soup-cli[train]==0.77.0'
    $env/bin/python -c 'import soup_cli, torch, transformers, trl; print("soup-cli 0.77.0 with torch", torch.__version__, "transformers", transformers.__version__, "trl", trl.__version__)'
    touch $env/done
}

for name in ${*:-llama-factory soup}; do
    if [ -e ".envs/$name/done" ]; then
        echo ".envs/$name is there already"
        continue
    fi
    case $name in
        llama-factory) llama_factory ;;
        soup) soup ;;
        *) echo "$name: no such environment; llama-factory or soup" >&2; exit 2 ;;
    esac
done
