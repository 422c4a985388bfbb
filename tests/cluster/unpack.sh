#!/usr/bin/env bash
# unpack.sh FOLDER: Debian's Slurm, unpacked into a folder and not installed, for the tests marked slurm.
# Ends with an error, one line, where this cannot be (no apt, no archive in reach).
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
trap 'echo "Slurm cannot be unpacked from Debian packages here." >&2' ERR
mkdir -p "$folder/debs/partial"
download() {
    apt-get install --download-only --yes --no-install-recommends \
        -o Debug::NoLocking=1 -o APT::Sandbox::User= -o Dir::Cache::archives="$folder/debs" \
        slurmctld slurmd slurm-client munge >/dev/null 2>&1
}
download || { apt-get update >/dev/null 2>&1 && download; }
for package in "$folder"/debs/*.deb; do
    dpkg-deb --extract "$package" "$folder"
done
test -x "$folder/usr/sbin/slurmctld-wlm"
rm -r "$folder/debs"
