#!/bin/bash
# `make install` and `make uninstall` on a node, after the package is purged.
. "${0%/*}/common.sh"
# What pip would fetch is here.
export PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels
cd "${0%/*}/../.."
[[ -e /run/netns/pod ]] || network

step "make install: nothing starts by itself"
nothing_left
make install
[[ $(systemctl is-active pointsman) == inactive ]] || fail "somebody started it"
configure
cp /srv/pointsman/.vm/sockets/* /var/cache/pointsman
patience
systemctl daemon-reload

step "systemctl enable --now"
systemctl enable --now pointsman
[[ $(ask) == hello ]] || fail "nobody answers at $VIP"
until_holds 600 healthy
serves || fail "clients outside are not served"
pointsman status
[[ $(readlink -f "/proc/$(pid)/exe") == /usr/bin/python3* ]] || fail "another Python"
grep -q /opt/pointsman "/proc/$(pid)/cmdline" || fail "it does not run from its prefix"
no_refusals

step "make install again, under load"
before=$(pid)
load_begins
make install
[[ $(pid) != "$before" ]] || fail "the old one still runs"
until_holds 600 healthy

step "stop under load"
systemctl stop pointsman
sleep 1
load_ends
serves || fail "a stop took the kernel's balancing away"

step "make uninstall: nothing is left but what somebody wrote"
systemctl start pointsman
make uninstall
[[ $(ask) == "" && $(ask_outside) == "" ]] || fail "still balanced"
[[ -e /etc/pointsman/config.yaml && -e /etc/pointsman/manifests/web.yaml ]] || fail "it took what was written"
rm -r /etc/pointsman
nothing_left

step "make uninstall once more: nothing to do, and no failure"
make uninstall
step "all holds"
