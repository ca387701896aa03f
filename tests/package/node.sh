#!/bin/bash
# Runs in the machine as root, with systemd as process 1. /srv has the package twice, as 1.deb and as
# the newer 2.deb. Each step says what it shows; the first that does not hold ends all.
set -euo pipefail

VIP=10.96.0.50

step() { echo "== $*"; }

fail() {
    echo "FAILED: $*"
    systemctl status --no-pager --full pointsman || true
    journalctl --no-pager -u pointsman -n 60 || true
    pointsman status || true
    exit 1
}

# What the Service's backend says, "" if nobody does.
ask() { python3 /srv/load.py once "$VIP" 80; }

until_holds() { # SECONDS COMMAND…
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || fail "not within time: $*"
        sleep 0.5
    done
}

status_text() { systemctl show -P StatusText pointsman; }
says() { [[ $(status_text) == *"$1"* ]]; }
pid() { systemctl show -P MainPID pointsman; }
healthy() { pointsman status >/dev/null; }
refusals() {
    journalctl --no-pager -u pointsman -o cat |
        grep -i "not permitted\|permission denied\|read-only\|traceback" || true
}

export DEBIAN_FRONTEND=noninteractive
mkdir -p /etc/pointsman/manifests
cat >/etc/pointsman/manifests/web.yaml <<END
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {clusterIP: $VIP, ports: [{name: http, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [192.0.2.1]}]
END
ip link set lo up
ip address add 192.0.2.1/32 dev lo
python3 /srv/load.py serve 192.0.2.1 8080 &
# Nothing but Pointsman knows the address; without a route there is nowhere to ask.
ip route add 10.96.0.0/12 dev lo

step "install: enabled, started, ready, and it serves"
dpkg -i /srv/1.deb
systemctl is-enabled pointsman
systemctl is-active pointsman || fail "not active"
[[ $(ask) == hello ]] || fail "nobody answers at $VIP"
until_holds 300 healthy
pointsman status
pointsman verify
pointsman map list
pointsman --version
status_text
says "serves 2 Services" || says "serves 1 Services" || fail "the status is: $(status_text)"
refused=$(refusals)
[[ -z $refused ]] || fail "the sandbox refuses: $refused"
[[ $(cat /proc/sys/net/ipv4/ip_local_reserved_ports) == *30000* ]] || fail "no reserved ports"

step "what it may do: $(grep CapBnd "/proc/$(pid)/status") $(grep Seccomp: "/proc/$(pid)/status")"

step "an endpoint leaves: all network namespaces are looked into"
looks() { pointsman status -o json | python3 -c 'import json, sys; print(json.load(sys.stdin)["stale"])'; }
ip netns add pod
sed 's/name: web/name: udp/; s/port: 80}/port: 80, protocol: UDP}/
    s/port: 8080}/port: 8080, protocol: UDP}/; s/service-name: web/service-name: udp/' \
    /etc/pointsman/manifests/web.yaml | sed "s/$VIP/10.96.0.51/" >/etc/pointsman/manifests/udp.yaml
systemctl reload pointsman
says "serves 3 Services" || fail "the status is: $(status_text)"
looks
rm /etc/pointsman/manifests/udp.yaml
systemctl reload pointsman
sleep 5
looks
refused=$(refusals)
[[ -z $refused ]] || fail "the sandbox refuses: $refused"

step "reload: what is written before is in force when it returns"
before=$(pid)
sed -i '1i # changed' /etc/pointsman/config.yaml
echo 'externalIPs: local' >>/etc/pointsman/config.yaml
systemctl reload pointsman
[[ $(pid) == "$before" ]] || fail "it was started again"
pointsman status -o json | grep -q 'external.*"local"' ||
    fail "externalIPs is not local"
echo 'externalIPs: [' >>/etc/pointsman/config.yaml
systemctl reload pointsman
says "to be mended" || fail "a bad file is not told: $(status_text)"
[[ $(ask) == hello ]] || fail "a bad file took something away"
sed -i '$d' /etc/pointsman/config.yaml
systemctl reload pointsman

step "journal: a problem has fields"
cat >/etc/pointsman/manifests/bad.yaml <<END
apiVersion: v1
kind: Service
metadata: {name: bad}
spec: {clusterIP: nonsense, ports: [{port: 80}]}
END
systemctl reload pointsman
until_holds 20 journalctl -q --grep . -u pointsman "POINTSMAN_OBJECT=Service default/bad"
journalctl --no-pager -n 1 -o json "POINTSMAN_OBJECT=Service default/bad" |
    python3 -c 'import json, sys; print({k: v for k, v in json.load(sys.stdin).items() if "POINTS" in k or k == "PRIORITY"})'
rm /etc/pointsman/manifests/bad.yaml

step "upgrade, downgrade, watchdog, stop: under load no connect fails"
python3 /srv/load.py load "$VIP" 80 /tmp/load &
load=$!
sleep 2
dpkg -i --force-confold /srv/2.deb
systemctl is-active pointsman || fail "not active after the upgrade"
[[ $(dpkg-query -W -f '${Version}' pointsman) == *+1 ]] || fail "no upgrade"
until_holds 300 healthy
dpkg -i --force-confold --force-downgrade /srv/1.deb
systemctl is-active pointsman || fail "not active after the downgrade"
until_holds 300 healthy

mkdir -p /run/systemd/system/pointsman.service.d
printf '[Service]\nWatchdogSec=8\n' >/run/systemd/system/pointsman.service.d/fast.conf
systemctl daemon-reload
systemctl restart pointsman
stuck=$(pid)
kill -STOP "$stuck"
anew() { [[ $(pid) != "$stuck" && $(systemctl is-active pointsman) == active ]]; }
until_holds 120 anew
journalctl --no-pager -u pointsman -o cat | grep -i "watchdog timeout" || fail "no watchdog"

systemctl stop pointsman
systemctl is-failed pointsman && fail "a stop is a failure"
[[ $(ask) == hello ]] || fail "a stop took the kernel's balancing away"
kill "$load"
wait "$load" || true
cat /tmp/load
grep -q '^failed 0 ' /tmp/load || fail "connects failed"

step "remove: nothing is detached"
dpkg -r pointsman
[[ $(ask) == hello ]] || fail "removing took the kernel's balancing away"
[[ -e /etc/pointsman/config.yaml ]] || fail "removing took the configuration"

step "purge: nothing is left"
rm /etc/pointsman/manifests/*
dpkg -P pointsman
[[ $(ask) == "" ]] || fail "still balanced"
left=$(find / -xdev -name '*pointsman*' -not -path '/proc/*' -not -path '/srv/*' \
    -not -path '/run/systemd/system/*' -not -path '/sys/fs/cgroup/*' -not -path '/var/lib/systemd/*'; ls -d /sys/fs/bpf/*; ls -d /run/pointsman 2>/dev/null) || true
echo "left: $left"
[[ -z $left ]] || fail "left behind: $left"
[[ $(cat /proc/sys/net/ipv4/ip_local_reserved_ports) == "" ]] || fail "ports are still reserved"
step "all holds"
