#!/bin/sh
# The Portkey gateway into bench/.peers/portkey, in the version that the lock file names.
set -eu
cd "$(dirname "$0")"
place=../.peers/portkey
cmp -s portkey/package-lock.json "$place/installed" && exit

mkdir -p "$place"
rm -f "$place/installed"
cp portkey/package.json portkey/package-lock.json "$place"
npm ci --prefix "$place" --ignore-scripts --no-audit --no-fund
# Last: an installation that was interrupted is taken up again.
cp portkey/package-lock.json "$place/installed"
