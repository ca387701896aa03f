# Read by the scripts beside it, which run in a machine as root, with systemd as process 1: a node with
# one pod, one client outside, and no way out. Each step says what it shows; the first that does not
# hold ends all.
# shellcheck shell=bash
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive

LOAD=/srv/pointsman/tests/package/load.py
VIP=10.96.0.50    # of the Service web, for the node itself
UDP_VIP=10.96.0.51
NODE=198.51.100.1 # the node as the client outside knows it
NODE_PORT=30080   # of web
POD=10.244.0.2

step() { echo "== $((SECONDS / 60)):$(printf %02d $((SECONDS % 60))) $*"; }

fail() {
    echo "FAILED: $*"
    systemctl status --no-pager --full pointsman || true
    journalctl --no-pager -u pointsman -n 60 || true
    pointsman status || true
    exit 1
}

until_holds() { # SECONDS COMMAND…
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || fail "not within time: $*"
        sleep 0.5
    done
}

# NAME ADDRESS GATEWAY: a network namespace, whose link on the node is to-NAME.
namespace() {
    ip netns add "$1"
    ip link add "to-$1" type veth peer name eth0 netns "$1"
    ip address add "$3/24" dev "to-$1"
    ip link set "to-$1" up
    ip -netns "$1" link set lo up
    ip -netns "$1" address add "$2/24" dev eth0
    ip -netns "$1" link set eth0 up
    ip -netns "$1" route add default via "$3"
}

network() {
    sysctl -q -w net.ipv4.ip_forward=1
    namespace pod "$POD" 10.244.0.1
    namespace client 198.51.100.2 "$NODE"
    ip netns exec pod python3 "$LOAD" serve "$POD" 8080 &
    # Nothing but Pointsman knows ClusterIPs; without a route there is nowhere to ask.
    ip route add 10.96.0.0/12 dev lo
}

# NAME VIP PROTOCOL NODE_PORT [ENDPOINT]
service() {
    cat <<END_OF_SERVICE
apiVersion: v1
kind: Service
metadata: {name: $1}
spec:
  type: NodePort
  clusterIP: $2
  ports: [{name: main, protocol: $3, port: 80, nodePort: $4}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: $1, labels: {kubernetes.io/service-name: $1}}
addressType: IPv4
ports: [{name: main, protocol: $3, port: 8080}]
endpoints: [{addresses: [${5-$POD}]}]
END_OF_SERVICE
}

# The configuration that is shipped, with the client's device.
configure() {
    local shipped=/srv/pointsman/deploy/systemd/config.yaml
    mkdir -p /etc/pointsman/manifests
    { cat "$shipped"; echo "devices: to-client"; } >/etc/pointsman/config.yaml
    service web "$VIP" TCP "$NODE_PORT" >/etc/pointsman/manifests/web.yaml
    install -d -m 700 /var/cache/pointsman
    cp /srv/pointsman/.vm/compiled/* /var/cache/pointsman
}

# An emulated CPU needs its time.
SLOW=/run/systemd/system/pointsman.service.d/slow.conf
patience() {
    mkdir -p "${SLOW%/*}"
    printf '[Service]\nEnvironment=POINTSMAN_LOAD_TIMEOUT=900\nTimeoutStartSec=30min\n' >"$SLOW"
}

# What web's backend says to the node and to the client outside, "" if nobody does.
ask() { python3 "$LOAD" once "$VIP" 80; }
ask_outside() { ip netns exec client python3 "$LOAD" once "$NODE" "$NODE_PORT"; }
serves() { [[ $(ask) == hello && $(ask_outside) == hello ]]; }

load_begins() {
    python3 "$LOAD" load "$VIP" 80 /tmp/load.inside &
    inside=$!
    ip netns exec client python3 "$LOAD" load "$NODE" "$NODE_PORT" /tmp/load.outside &
    outside=$!
}

load_ends() {
    kill "$inside" "$outside"
    wait "$inside" "$outside" || true
    echo "from the node: $(cat /tmp/load.inside)"
    echo "from outside: $(cat /tmp/load.outside)"
    grep -q '^failed 0 of ...' /tmp/load.inside || fail "connects of the node failed"
    grep -q '^failed 0 of ...' /tmp/load.outside || fail "connects of a client outside failed"
}

status_text() { systemctl show -P StatusText pointsman; }
says() { [[ $(status_text) == *"$1"* ]]; }
pid() { systemctl show -P MainPID pointsman; }
# FIELD… of `status -o json`.
told() {
    pointsman status -o json | python3 -c 'import functools, json, sys
print(json.dumps(functools.reduce(lambda at, key: at[key], sys.argv[1:], json.load(sys.stdin))))' "$@"
}
# All is well, and packets are served, too.
healthy() { pointsman status >/dev/null && [[ $(told devices loading) == false ]]; }
refusals() {
    journalctl --no-pager -u pointsman -o cat |
        grep -i "not permitted\|permission denied\|read-only\|traceback" || true
}
no_refusals() {
    local found
    found=$(refusals)
    [[ -z $found ]] || fail "the sandbox refuses: $found"
}

# Everything of ours that is on this node, in files, in the kernel and in systemd.
everything() {
    find / /run /tmp /sys/fs/bpf /sys/fs/cgroup -xdev -name '*pointsman*' -not -path '/srv/*' -not -path '/tmp/load.*'
    # systemd has programs of its own.
    bpftool -j prog show | python3 -c 'import json, sys
for each in json.load(sys.stdin):
    if not each.get("name", "").startswith("sd_"):
        print("program", each.get("name"))'
    bpftool -j map show | python3 -c 'import json, sys
for each in json.load(sys.stdin):
    print("map", each.get("name"))'
    bpftool -j link show | python3 -c 'import json, sys
for each in json.load(sys.stdin):
    print("link", each["type"])'
    # Before Linux 6.6: the filters; the qdisc that they are in may be others', and stays.
    tc filter show dev to-client ingress 2>/dev/null || true
    tc filter show dev to-client egress 2>/dev/null || true
    ip link show | grep -w xdp || true
    systemctl list-unit-files --no-legend 'pointsman*'
    [[ -z $(cat /proc/sys/net/ipv4/ip_local_reserved_ports) ]] || echo "reserved ports"
}

nothing_left() {
    local left
    rm -rf "${SLOW%/*}"
    left=$(everything)
    [[ -z $left ]] || fail "left behind: $left"
}
