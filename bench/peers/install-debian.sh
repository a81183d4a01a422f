#!/bin/sh
# The load generator, the wire's limit, and what Portkey runs on: Debian's packages, for which root is needed.
set -eu
missing=
for package in nginx-light:nginx wrk:wrk nodejs:node npm:npm; do
    command -v "${package#*:}" >/dev/null || missing="$missing ${package%:*}"
done
[ -z "$missing" ] || apt-get install --yes --no-install-recommends $missing
