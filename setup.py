"Reads everything from settings.ini (nbdev's own template needs pkg_resources, which current setuptools no longer has)."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
cfg = ConfigParser(delimiters=["="])
cfg.read(here / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], author_email=cfg["author_email"], license="Apache-2.0", url=cfg["git_url"],
    packages=find_packages(include=["alpaca_ft", "alpaca_ft.*"]), package_data={"alpaca_ft": ["rows/*", "templates/*"]},
    python_requires=">=" + cfg["min_python"], install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split() for name in ("dev", "eval", "near", "completion")},
    long_description=(here / "README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": ["alpaca_ft=alpaca_ft._modidx:d"]},
    zip_safe=False,
)
