#!/bin/sh
# Make the environment of a contender that cannot share ours: LLaMA-Factory, in benchmarks/.envs/llama-factory.
# usage: benchmarks/make_envs.sh        (PYTHON=python3.11 to choose; about 3 GB, once; delete the folder to make it anew)
set -eu
cd "$(dirname "$0")"
env=.envs/llama-factory
if [ -e $env/done ]; then echo "$env is there already"; exit 0; fi
rm -rf $env
${PYTHON:-python3} -m venv $env
pip="$env/bin/python -m pip --quiet --disable-pip-version-check"
$pip install torch==2.13.0 llamafactory==0.9.5
# Text needs neither vision nor audio, and their wheels may be built for another torch: an absent torchvision is handled
# by its users; torchaudio is imported by name, so an empty package stands in for it.
$pip uninstall --yes torchvision torchaudio
site=$($env/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site/torchaudio" "$site/torchaudio-2.13.0.dist-info"
: > "$site/torchaudio/__init__.py"
printf 'Metadata-Version: 2.1\nName: torchaudio\nVersion: 2.13.0\nSummary: empty stand-in\n' > "$site/torchaudio-2.13.0.dist-info/METADATA"
$env/bin/python -c 'import llamafactory, torch, transformers, trl; print("llamafactory 0.9.5 with torch", torch.__version__, "transformers", transformers.__version__, "trl", trl.__version__)'
touch $env/done
