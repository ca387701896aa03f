#!/bin/bash
# The Debian package, from its installation to its purge. Two are there: 1.deb, and the newer 2.deb, whose
# maps have another layout.
. "${0%/*}/common.sh"
PACKAGES=/srv/pointsman/dist

step "a node without Pointsman"
network
nothing_left
serves && fail "somebody else serves"
configure
patience

step "install: enabled, started, ready, and it serves"
dpkg -i --force-confold "$PACKAGES/1.deb"
systemctl is-enabled pointsman
systemctl is-active pointsman || fail "not active"
[[ $(ask) == hello ]] || fail "nobody answers at $VIP"
(($(ls /var/cache/pointsman | wc -l) > $(ls /srv/pointsman/.vm/compiled | wc -l))) ||
    fail "what was compiled is not kept"
until_holds 600 healthy
step "packets are served, too"
[[ $(ask_outside) == hello ]] || fail "nobody answers at $NODE:$NODE_PORT"
pointsman status
pointsman verify
pointsman map list >/tmp/maps
pointsman --version
says "serves 2 Services" || says "serves 1 Services" || fail "the status is: $(status_text)"
no_refusals
[[ $(cat /proc/sys/net/ipv4/ip_local_reserved_ports) == *30000* ]] || fail "no reserved ports"
man=/usr/share/man/man8/pointsman.8.gz
[[ -s $man ]] || fail "no man page"
bash -ic '. /usr/share/bash-completion/bash_completion; _completion_loader pointsman
    complete -p pointsman' 2>/dev/null || fail "bash completes nothing"

step "what it may do: $(grep CapBnd "/proc/$(pid)/status") $(grep Seccomp: "/proc/$(pid)/status")"
systemd-analyze security --no-pager pointsman | tail -n 1

step "an endpoint leaves: sockets of other network namespaces are ended"
service udp "$UDP_VIP" UDP 30053 10.244.0.8 >/etc/pointsman/manifests/udp.yaml
systemctl reload pointsman
says "serves 3 Services" || says "serves 2 Services" || fail "the status is: $(status_text)"
for space in client pod; do
    ip netns exec "$space" python3 "$LOAD" hold "$UDP_VIP" 80 "/tmp/load.$space" &
    until_holds 20 grep held "/tmp/load.$space"
done
service udp "$UDP_VIP" UDP 30053 10.244.0.9 >/etc/pointsman/manifests/udp.yaml
systemctl reload pointsman
for space in client pod; do
    until_holds 60 grep ECONNABORTED "/tmp/load.$space"
done
rm /etc/pointsman/manifests/udp.yaml
no_refusals

step "reload: what is written before is in force when it returns"
before=$(pid)
echo 'externalIPs: local' >>/etc/pointsman/config.yaml
systemctl reload pointsman
[[ $(pid) == "$before" ]] || fail "it was started again"
pointsman status -o json | grep -q 'external.*"local"' || fail "externalIPs is not local"
echo 'externalIPs: [' >>/etc/pointsman/config.yaml
systemctl reload pointsman
says "to be mended" || fail "a bad file is not told: $(status_text)"
serves || fail "a bad file took something away"
sed -i '$d' /etc/pointsman/config.yaml
systemctl reload pointsman

step "journal: a problem has fields"
service bad nonsense TCP 30054 >/etc/pointsman/manifests/bad.yaml
systemctl reload pointsman
bad="POINTSMAN_OBJECT=Service default/bad"
until_holds 20 journalctl -q --grep . -u pointsman "$bad"
journalctl --no-pager -n 1 -o json "$bad" | python3 -c 'import json, sys
print({k: v for k, v in json.load(sys.stdin).items() if "POINTS" in k or k == "PRIORITY"})'
rm /etc/pointsman/manifests/bad.yaml
systemctl reload pointsman

load_begins
sleep 3
step "upgrade under load, to another layout"
first=$(told datapath generation)
dpkg -i --force-confold "$PACKAGES/2.deb"
[[ $(dpkg-query -W -f '${Version}' pointsman) == *+1 ]] || fail "no upgrade"
systemctl is-active pointsman || fail "not active after the upgrade"
until_holds 600 healthy
[[ $(told datapath generation) != "$first" ]] || fail "the maps are the same"

step "downgrade under load"
dpkg -i --force-confold --force-downgrade "$PACKAGES/1.deb"
systemctl is-active pointsman || fail "not active after the downgrade"
until_holds 600 healthy
[[ $(told datapath generation) == "$first" ]] || fail "not the maps of the first version"
(($(find /sys/fs/bpf/pointsman -maxdepth 1 -type d -name 'g*' | wc -l) <= 1)) || find /sys/fs/bpf/pointsman -maxdepth 1

step "watchdog under load: who is stuck is started again"
printf '[Service]\nWatchdogSec=8\n' >"${SLOW%/*}/fast.conf"
systemctl daemon-reload
systemctl restart pointsman
stuck=$(pid)
kill -STOP "$stuck"
anew() { [[ $(pid) != "$stuck" && $(systemctl is-active pointsman) == active ]]; }
until_holds 120 anew
journalctl --no-pager -u pointsman -o cat | grep -i "watchdog timeout" || fail "no watchdog"
rm "${SLOW%/*}/fast.conf"
systemctl daemon-reload

step "stop under load"
systemctl stop pointsman
systemctl is-failed pointsman && fail "a stop is a failure"
serves || fail "a stop took the kernel's balancing away"

step "remove under load: nothing is detached"
dpkg -r pointsman
sleep 1
load_ends
serves || fail "removing took the kernel's balancing away"
[[ -e /etc/pointsman/config.yaml ]] || fail "removing took the configuration"

step "purge: nothing is left"
rm /etc/pointsman/manifests/*
dpkg -P pointsman
[[ $(ask) == "" && $(ask_outside) == "" ]] || fail "still balanced"
nothing_left
step "all holds"
