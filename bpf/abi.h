/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Every layout that the programs and the agent share, once. ctl/pointsman/abi.py reads this file,
 * so keep to what it understands: fixed-width fields, named padding, enumerators with a value.
 *
 * Addresses are 16 bytes in network order; IPv4 is stored as ::ffff:a.b.c.d, so that one map and
 * one code path serve IPv4, IPv6 and IPv4-mapped sockets. Ports are in network order (__be16).
 */
#ifndef POINTSMAN_ABI_H
#define POINTSMAN_ABI_H

/* service.algorithm, the low bits: how one endpoint of a set is chosen. */
enum algorithm {
	ALGORITHM_RANDOM = 0,
	ALGORITHM_ROUND_ROBIN = 1,
	ALGORITHM_LEAST_CONNECTIONS = 2, /* of two by chance the one with fewer open connections */
	ALGORITHM_PEAK_EWMA = 3, /* of two by chance the one with less connect time times open connections */
	ALGORITHM_MAGLEV = 4, /* a client keeps its endpoint as long as that is there */
	ALGORITHM_MASK = 7,
};

/* service.algorithm, the other bits: what else has a say. */
enum choice_flag {
	CHOICE_WEIGHTED = 8, /* endpoints count as `shares` says */
	CHOICE_POLICY = 16, /* `policies` has something about this service port */
	CHOICE_AVOID = 32, /* endpoints that are ejected are passed over */
	CHOICE_ZONE = 64, /* only endpoints of this zone are drawn: beyond policy.room all count */
};

/* What an empty set answers; it stands in the base half of service.set when the count is 0. */
enum empty {
	EMPTY_REFUSE = 0, /* no endpoints: ECONNREFUSED, as kube-proxy's REJECT */
	EMPTY_UNREACHABLE = 1, /* none under a policy: EHOSTUNREACH, where kube-proxy drops */
};

/*
 * service.flags: what a hook has to ask beyond the address. 0 for a ClusterIP.
 *
 * The first three stand on wildcards (port 0, protocol 0): such an address belongs to a node, and
 * what it does not define itself is looked up among the NodePorts, whose address is 0.0.0.0 or ::.
 */
enum service_flag {
	SERVICE_NODE = 1, /* an address of this node */
	SERVICE_REMOTE_NODE = 2, /* of another node: not what only that node may decide */
	SERVICE_LOOPBACK = 4, /* 127.0.0.1 (for all of 127.0.0.0/8) or ::1: from the host netns only */
	SERVICE_PASS = 8, /* wildcard of an address that is nobody's VIP: nothing is refused there */
	SERVICE_THIS_NODE = 16, /* a NodePort that is not translated at another node's address */
	SERVICE_HOST_NETNS = 32, /* translated in the host's network namespace only */
	SERVICE_GUARDED = 64, /* no process of the host may bind to it */
	SERVICE_NODE_PORT = 128, /* found by way of a node's address, never by 0.0.0.0 or :: itself */
};

/* service.packets: what concerns packets only, which come from outside or from pods without hooks. */
enum packets_flag {
	PACKETS_OUTSIDE = 1, /* served to clients outside of the cluster, from service.outside */
	PACKETS_LOCAL = 2, /* only endpoints of this node; the client's address is kept */
	PACKETS_RANGES = 4, /* only clients that source_ranges has */
};

/* slot.flags: where an endpoint is. None of them: the route tells. */
enum slot_flag {
	SLOT_HERE = 1, /* on this node */
	SLOT_ELSEWHERE = 2, /* on another */
};

enum {
	GENERATION_RETIRED = 0x80000000, /* bit of load.generation: the endpoint has left */
	MORE_PLACES = 3,
	IN_OVERFLOW = 0x10000, /* one record of bucket.others that is in sockets_overflow */
	DATAGRAMS_PER_SOCKET = 4,
	MAX_CIDRS = 4,
};

/* Index into `counters`. */
enum counter {
	COUNTER_REFUSED = 0, /* service without endpoints */
	COUNTER_UNREACHABLE = 1, /* no endpoint under a policy */
	COUNTER_UNDEFINED_PORT = 2, /* known VIP, port that no Service defines */
	COUNTER_UNRECORDED = 3, /* no room for the socket's record */
	COUNTER_OVERFLOWED = 4, /* bucket full, record went to sockets_overflow */
	COUNTER_UNUSED_ADDRESS = 5, /* address of the service CIDR that no Service has */
	COUNTER_BIND_REFUSED = 6, /* bind() to a NodePort or a load balancer's port */
	COUNTER_AFFINITY_FULL = 7, /* no room to remember a client's endpoint */
	COUNTER_ALL_FULL = 8, /* every endpoint has policy.max_connections */
	COUNTER_CONNECTED = 9, /* connects that an endpoint answered */
	COUNTER_CONNECT_FAILED = 10, /* that it did not, or not for long */
	COUNTER_EJECTED = 11, /* endpoints, each as often as it was */
	COUNTERS = 12,
};

/* frontends: key. Port 0 with protocol 0 catches the undefined ports of a known VIP. */
struct frontend_key {
	__be32 addr[4];
	__be16 port;
	__u8 proto; /* IPPROTO_TCP, IPPROTO_UDP */
	__u8 pad;
};

/* frontends: value. Never rewritten: a hash may show a reader another key's value meanwhile. */
struct frontend {
	__u32 service; /* index into services */
};

/* services: one frontend, one cache line. */
struct service {
	__u64 set; /* count << 32 | first slot; switched by one release store */
	__u32 owner; /* the service port, index into names; 0 = this element is not in use */
	__u8 algorithm; /* enum algorithm and CHOICE_…; owner to packets are one 64-bit store */
	__u8 flags; /* SERVICE_… */
	__u16 packets; /* PACKETS_… */
	__u32 affinity; /* seconds that a client keeps its endpoint, 0 = none */
	struct frontend_key key; /* own key: a reader compares it with what it looked up */
	__u64 outside; /* as set, for clients outside of the cluster */
	__u64 table; /* of `outside`: entries << 32 | first line in maglev; 0 = none; one store */
	__u64 inside; /* as table, of `set` */
};

/*
 * slots: one endpoint of a set. Never rewritten before every reader of the set has ended. A set is
 * sorted by address, then port, both as numbers: membership is a binary search.
 */
struct slot {
	__be32 addr[4];
	__be16 port;
	__u16 flags; /* SLOT_… */
	__u32 endpoint; /* index into load */
	__u32 generation; /* of that endpoint id; 0 is never valid */
	__u32 owner; /* the service port it belongs to */
};

/*
 * shares: how the slot of the same number is drawn in a set with weights, by Walker's aliases: a slot that
 * was hit by chance stands for itself in `keep` of 2^32 cases, else for the one at place `other` of the set.
 */
struct share {
	__u32 keep; /* with `other` one load */
	__u32 other;
	__u32 weight; /* of this slot's own endpoint: to MAX_WEIGHT, 0 = never chosen; WEIGHT_ELSEWHERE */
	__u32 pad;
};

/*
 * load: what the programs know of one endpoint id, one cache line. Written by programs only. Times are
 * CLOCK_MONOTONIC in ns, to a few milliseconds.
 */
struct load {
	__u32 generation;
	__u32 open; /* connections open now; signed while an upgrade merges two maps */
	__u32 owner; /* as service.owner */
	__u32 latency; /* µs: connect time, rises at once and falls as time goes by; 0 = not known */
	__u64 measured; /* when a connect succeeded or failed last */
	__u64 until; /* ejected until then; 0 = not ejected; UNTIL_TRIAL: a connection tries it */
	__u64 window; /* outcomes of late: WINDOW_… */
	__u32 streak; /* connects that failed in a row */
	__u32 reserved[3];
	__u64 pad;
};

/* load.window: three counts; all are halved when there are WINDOW_FULL connects. */
enum window {
	WINDOW_BITS = 20, /* of each: connects, failures of them, ejections */
	WINDOW_FULL = 1024,
};

enum {
	MAX_WEIGHT = 10000,
	USUAL_WEIGHT = 100,
	WEIGHT_ELSEWHERE = 0x10000, /* in another zone: chosen where this zone has no room, never drawn */
	UNTIL_TRIAL = 1, /* bit of load.until */
};

enum policy_flag {
	POLICY_WATCH = 1, /* endpoints that fail are ejected, or would be */
};

/*
 * policies: how one service port deals with its endpoints, by its owner. Written by the agent, but for
 * `ejected`.
 */
struct policy {
	__u32 flags; /* POLICY_… */
	__u32 max_connections; /* of one endpoint from this node; 0 = as many as come */
	__u32 room; /* connections from this node that an endpoint of its zone takes before others get some */
	__u32 streak; /* failures in a row that eject; 0 = never */
	__u32 percent; /* of the connects of late that failed, which eject; 0 = never */
	__u32 volume; /* connects of late from which on the percentage counts */
	__u64 shortest; /* ns, the first ejection; each further one is twice as long */
	__u64 longest; /* ns */
	__u64 trial; /* ns that a connection has to show that an endpoint is well again */
	__u32 most; /* endpoints that may be ejected at a time */
	__u32 pad;
	__u64 ejected; /* now; written by programs only */
};

/* names: a service port in Kubernetes' words, for people who look into the maps. */
struct name {
	__u8 namespace[64];
	__u8 service[64];
	__u8 port[64];
};

struct cidr {
	__be32 addr[4];
	__be32 mask[4];
};

/* settings: element 0 is how the agent runs. */
struct settings {
	__u64 host_netns; /* cookie of the host's network namespace, 0 = not known */
	__u32 skipped; /* number of elements in skipped_netns: 0 spares the question */
	__u32 cidrs; /* how many of cidr[] hold: unused addresses in them are refused */
	struct cidr cidr[4];
};

/* affinity: a client is a network namespace, its endpoint is that of one service port and family. */
struct affinity_key {
	__u64 netns; /* cookie */
	__u32 owner; /* as service.owner */
	__u32 family; /* 4 or 6 */
};

struct affinity {
	__u64 seen; /* CLOCK_MONOTONIC, ns, of the last new connection */
	__be32 addr[4];
	__be16 port;
	__u16 pad;
	__u32 check; /* of key, address and port: elements of an LRU map are used again while read */
};

/* maglev: 32 entries of a table: each the place of an endpoint in the set. Behind the last entry stand
 * eight bytes by which the agent knows the endpoints that the table was made for. */
struct line {
	__u16 place[32];
};

/* source_ranges: the clients that a service with PACKETS_RANGES has. The value says nothing. */
struct source_range {
	__u32 prefix; /* bits that count: 32 of the service, and those of the address */
	__u32 service; /* index into services */
	__be32 addr[4];
};

/* ---- records of sockets: an ABI of their own, which changes rarely ---- */

enum counted {
	COUNTED_OPEN = 1, /* the record stands in load.open */
	COUNTED_OUTCOME = 2, /* how its connect ended stands in load.window */
};

/* One socket whose connect was translated. */
struct socket {
	__u32 endpoint;
	__u32 generation;
	__be32 vip[4];
	__be32 peer[4]; /* what the VIP was translated to */
	__be16 vip_port;
	__be16 peer_port;
	__u8 proto;
	__u8 counted; /* COUNTED_… */
	__u16 pad;
};

/* cookie: 0 = free, else the owner's; with COOKIE_BUSY while the record is being written. */
struct place {
	__u64 cookie;
	struct socket record;
};

/*
 * sockets: the sockets whose cookies share their low bits. Most often one or none: then this one
 * cache line is all that is touched, and since cookies come in sequence it is the next line of
 * memory each time.
 */
struct bucket {
	struct place first;
	__u32 others; /* records elsewhere: in sockets_more, and IN_OVERFLOW for each in overflow */
	__u32 turn; /* counts choices, so that a socket that connects again chooses anew */
};

/* sockets_more: the other places of a bucket. */
struct more {
	struct place place[3];
};

/* sockets_overflow: value */
struct overflow {
	struct socket record;
	__u64 netns; /* network namespace cookie: overflow is bounded for each */
};

/* datagrams: the endpoint that one unconnected UDP socket uses for one VIP. */
struct datagram {
	__be32 vip[4];
	__be32 peer[4];
	__be16 vip_port;
	__be16 peer_port;
	__u32 endpoint;
	__u32 generation;
	__u32 service;
	__u32 owner;
	__u32 sequence; /* of the last send; the smallest goes first */
	__u64 set; /* of the service, when the endpoint was last found in it */
};

struct datagrams {
	__u32 sequence;
	__u32 pad;
	struct datagram choice[4];
};

/* ---- what the agent asks of the correction programs (BPF_PROG_TEST_RUN input) ---- */

struct correction {
	__u32 endpoint;
	__u32 generation;
	__u32 owner; /* as service.owner */
	__u32 pad;
};

/* ---- packets: what comes from outside, and from pods whose sockets the hooks can't see ---- */

/* What a packet looks like when it arrives. */
struct tuple {
	__be32 source[4];
	__be32 destination[4];
	__be16 source_port;
	__be16 destination_port;
	__u8 proto;
	__u8 pad;
	__u16 reserved;
};

enum flow_flag {
	FLOW_REPLY = 1, /* packets from the endpoint; else from the client */
	FLOW_REMOTE = 2, /* the endpoint is on another node and sees this node as its client */
	FLOW_DSR = 4, /* packets go on in an IPIP tunnel, replies come past this node */
	FLOW_POD = 8, /* the client is a pod of this node, its device is served */
	FLOW_ANSWERED = 16, /* a packet of this direction came after the flow was made */
	FLOW_FIN = 32, /* TCP: FIN seen in this direction */
	FLOW_RST = 64, /* TCP: RST seen in this direction */
};

/* How the packets of a flow leave by XDP: what the kernel's routes and neighbours said a moment ago. */
struct way {
	__u64 until; /* CLOCK_MONOTONIC, ns, when they are asked again; 0 = not asked yet */
	__u32 from; /* ifindex of what the frame came in at */
	__u32 lower; /* ifindex of what sends it: of a VLAN, what it stands on */
	__u16 vlan; /* tag of the frame, 0 = none */
	__u16 mtu;
	__u8 macs[12]; /* destination and source, as a frame begins */
};

/*
 * flows, flows_new: one direction of a flow. Its packets become the mirror image of `other`, which is
 * the key of the other direction. A flow is in flows_new until both ends have spoken, so that a
 * flood of new ones drives out no other.
 */
struct flow {
	struct tuple other;
	__u64 seen; /* CLOCK_MONOTONIC, ns, of its last packet, to two seconds */
	__u32 endpoint;
	__u32 generation;
	__u32 owner; /* as service.owner */
	__u32 flags; /* FLOW_… */
	struct way way;
};

/* recent: what XDP did a moment ago with an IPv4 packet of these addresses and ports. 64 bytes, one line. */
struct recent {
	__be32 source;
	__be32 destination;
	__be16 source_port;
	__be16 destination_port;
	__u32 device; /* ifindex of what the frame came in at, and goes out of */
	__be32 new_source;
	__be32 new_destination;
	__be16 new_source_port;
	__be16 new_destination_port;
	__u32 endpoint; /* as in struct flow */
	__u32 generation; /* 0 = goes on though its endpoint has left */
	__u8 macs[12]; /* as in struct way */
	__u16 mtu;
	__u8 proto;
	__u8 verdict; /* PACKET_… */
	__u32 check; /* of the rest: CPUs write without a lock */
	__u64 until; /* CLOCK_MONOTONIC, ns */
};

/* affinity_clients: a client outside is an address. Value: struct affinity. */
struct client_key {
	__be32 addr[4];
	__u32 owner;
	__u32 pad;
};

/* fragments: the ports of a datagram whose first fragment has been seen. */
struct fragment_key {
	__be32 source[4];
	__be32 destination[4];
	__u32 id;
	__u32 proto;
};

struct fragment {
	__be16 source_port;
	__be16 destination_port;
	__u32 pad;
	__u64 seen;
};

/*
 * held_fragments: a link to the latest fragment that is held of a datagram: its turn << HELD_COUNT_BITS |
 * how many they are; 0 = none.
 */
enum {
	HELD_COUNT_BITS = 6,
};

enum device_flag {
	DEVICE_NODE = 1, /* leads out of the node: NodePorts, externalIPs, load balancers' addresses */
	DEVICE_POD = 2, /* host's side of a pod without hooks: all that a pod's sockets would get */
	DEVICE_RAW = 4, /* packets begin with the IP header (tunnels) */
	DEVICE_XDP = 8, /* XDP may send frames here, as its driver (or that of `lower`) can */
};

/* devices: key is an ifindex. */
struct device {
	__u32 flags; /* DEVICE_… */
	__u32 lower; /* ifindex of the device that carries its frames, with this VLAN tag; 0 = itself */
	__u32 vlan; /* 1 to 4094, 0 = no tag */
	__u8 mac[6]; /* its own: XDP takes what is sent to it, and nothing else; 0 = whatever comes */
	__u16 pad;
	__be32 ipv4[4]; /* this node's address for what goes out here; 0 = none of this family */
	__be32 ipv6[4];
};

/* vlans: the device that a tagged frame belongs to. */
struct vlan_key {
	__u32 lower;
	__u32 vlan;
};

/* packet_settings: element 0. Seconds; ports in host byte order. */
struct packet_settings {
	__u64 trace_until; /* CLOCK_MONOTONIC, ns: events are written to `trace` until then */
	__u16 first_port; /* of this node, for connections to endpoints on others */
	__u16 last_port;
	__u32 dsr; /* 1: FLOW_DSR for endpoints on other nodes */
	__u32 tcp_new; /* not answered, or not acknowledged */
	__u32 tcp_open;
	__u32 tcp_closing; /* FIN from both ends, or RST */
	__u32 udp_new;
	__u32 udp_open;
	__u32 pad;
};

/* Index into packet_counters, and `verdict` of an event. DROP_…: the packet went no further. */
enum verdict {
	PACKET_PASSED = 0, /* not ours; not counted */
	PACKET_HERE = 1, /* to an endpoint on this node */
	PACKET_FORWARDED = 2, /* to an endpoint on another node */
	PACKET_REPLIED = 3, /* back to the client */
	PACKET_TUNNELED = 4, /* DSR: to an endpoint's node in an IPIP tunnel */
	PACKET_SLOW = 5, /* left to TC, because XDP could not send it */
	PACKET_ERROR = 6, /* an ICMP error about a flow, translated */
	PACKET_REFUSED = 7, /* port unreachable sent: no endpoints */
	PACKET_TOO_BIG = 8, /* "fragmentation needed" or "packet too big" sent */
	FLOW_BEGUN = 9,
	FLOW_MOVED = 10, /* chosen anew: its endpoint has left, its tuple was used again, or half of it is gone */
	FLOW_PROMOTED = 11,
	DROP_NO_LOCAL_ENDPOINT = 12, /* none on this node under a policy */
	DROP_SOURCE_RANGE = 13, /* client not in loadBalancerSourceRanges */
	DROP_NO_PORT = 14, /* every port of this node towards the endpoint is taken */
	DROP_NO_ROOM = 15, /* flow tables are full */
	DROP_NO_ROUTE = 16,
	DROP_NO_NEIGHBOUR = 17,
	DROP_NO_ADDRESS = 18, /* the device has no address of the family */
	DROP_TTL = 19, /* reserved for what can't be left to the stack */
	DROP_FRAGMENT = 20, /* a later one, whose first was refused: nobody is told twice */
	DROP_ICMP_LIMIT = 21, /* refused or too big, without telling the sender: too many told already */
	DROP_MALFORMED = 22, /* a flow's packet that could not be rewritten */
	FLOW_UNPROMOTED = 23, /* stays among the new ones: flows is full */
	FRAGMENT_UNKNOWN = 24, /* a later fragment before its first, which can't be held: left to the stack */
	FRAGMENT_HELD = 25, /* a later fragment is kept until its first comes */
	FRAGMENT_RELEASED = 26, /* a first fragment has come, of which later ones are held */
	TRACE_LOST = 27, /* an event found no room in `trace` */
	VERDICTS = 28,
};

enum hook {
	HOOK_XDP = 0,
	HOOK_TC_INGRESS = 1,
	HOOK_TC_EGRESS = 2,
};

/* trace: one decision. */
struct event {
	__u64 time; /* CLOCK_MONOTONIC, ns */
	struct tuple before;
	struct tuple after;
	__u32 ifindex;
	__u32 length; /* of the frame, bytes */
	__u32 owner; /* as service.owner, 0 = not known */
	__u8 verdict; /* enum verdict */
	__u8 hook; /* enum hook */
	__u16 pad;
};

#endif
