// SPDX-License-Identifier: MIT OR GPL-2.0-only
// The XDP program on each NIC: frames to a guest's MAC address go to the AF_XDP socket of their queue, all others
// to the host as if nothing were here. One copy is loaded per NIC.
//
// Group addresses (broadcast, multicast) are passed, too: XDP cannot clone, and the host needs them. The daemon takes its
// copy of those from an AF_PACKET socket (src/group.rs).
//
// Answers to the daemon's probes (src/probe) go to the host like all of its frames, and are counted on the way. They come to the MAC
// address of the NIC that sent the probe, by whichever NIC the switch chooses.
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/icmpv6.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

// A MAC address as a map key: the two last bytes are 0.
struct mac_key {
	__u8 bytes[8];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, struct mac_key);
	__type(value, __u32);
} guest_macs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, 64);
	__type(key, __u32);
	__type(value, __u32);
} xsks SEC(".maps");

enum counter { REDIRECTED, PASSED, COUNTERS };

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} stats SEC(".maps");

#define MAX_NICS 8

// A probe that is under way: who is asked, and which NIC asks. IPv4 as ::ffff:a.b.c.d.
struct probe {
	__u8 target[16];
	__u32 nic;
};

// By the MAC address that the answer comes to.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_NICS);
	__type(key, struct mac_key);
	__type(value, struct probe);
} probes SEC(".maps");

struct answer {
	__u64 count;
	// CLOCK_MONOTONIC, nanoseconds.
	__u64 at;
	// The answering station's MAC address; the two last bytes are 0.
	struct mac_key from;
};

struct answers {
	struct answer of[MAX_NICS];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct answers);
} answers SEC(".maps");

// ARP for IPv4 over Ethernet, behind the Ethernet header.
struct arp {
	__be16 hardware, protocol;
	__u8 hardware_length, protocol_length;
	__be16 operation;
	__u8 sender_mac[6], sender[4], target_mac[6], target[4];
};

struct ipv4 {
	__u8 version_length, tos;
	__be16 length, id, fragment;
	__u8 ttl, protocol;
	__be16 checksum;
	__u8 source[4], destination[4];
};

struct ipv6 {
	__u8 class_and_flow[4];
	__be16 length;
	__u8 next, hop_limit, source[16], destination[16];
};

struct icmp {
	__u8 type, code;
	__be16 checksum;
	// Of an echo.
	__be16 id, sequence;
};

// A neighbour advertisement.
struct advertisement {
	struct icmp icmp;
	__u8 target[16];
};

// What every echo request of the daemon has.
#define ECHO_ID bpf_htons(0x766e)

// RFC 826, RFC 792, RFC 4861 4.4.
#define ARP_REPLY bpf_htons(2)
#define ECHO_REPLY 0
#define NEIGHBOUR_ADVERTISEMENT 136

// memcmp would be a call, which there is nothing to link with.
static __always_inline int same4(const __u8 *a, const __u8 *b)
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3];
}

static __always_inline int is_v6(const struct probe *probe, const __u8 *address)
{
	const __u8 *target = probe->target;

	return same4(target, address) && same4(target + 4, address + 4) && same4(target + 8, address + 8) &&
	       same4(target + 12, address + 12);
}

static __always_inline int is_v4(const struct probe *probe, const __u8 *address)
{
	return same4(probe->target + 12, address) && probe->target[10] == 0xff && probe->target[11] == 0xff;
}

// Whether a frame to a NIC is the answer to that probe.
static __always_inline int answers_to(const struct probe *probe, struct ethhdr *ethernet, void *end)
{
	void *payload = ethernet + 1;

	if (ethernet->h_proto == bpf_htons(ETH_P_ARP)) {
		struct arp *arp = payload;

		return (void *)(arp + 1) <= end && arp->operation == ARP_REPLY && is_v4(probe, arp->sender);
	}
	if (ethernet->h_proto == bpf_htons(ETH_P_IP)) {
		struct ipv4 *ip = payload;
		struct icmp *icmp = (void *)(ip + 1);

		// The echo of a request without options has none.
		return (void *)(icmp + 1) <= end && ip->version_length == 0x45 && ip->protocol == IPPROTO_ICMP &&
		       icmp->type == ECHO_REPLY && icmp->id == ECHO_ID && is_v4(probe, ip->source);
	}
	if (ethernet->h_proto == bpf_htons(ETH_P_IPV6)) {
		struct ipv6 *ip = payload;
		struct advertisement *advertisement = (void *)(ip + 1);

		return (void *)(advertisement + 1) <= end && ip->next == IPPROTO_ICMPV6 &&
		       advertisement->icmp.type == NEIGHBOUR_ADVERTISEMENT &&
		       is_v6(probe, advertisement->target);
	}
	return 0;
}

static __always_inline void note_answer(const struct mac_key *to, struct ethhdr *ethernet, void *end)
{
	struct probe *probe = bpf_map_lookup_elem(&probes, to);
	struct answers *all;
	struct answer *answer;
	__u32 zero = 0;

	if (!probe || !answers_to(probe, ethernet, end))
		return;
	all = bpf_map_lookup_elem(&answers, &zero);
	if (!all)
		return;
	answer = &all->of[probe->nic & (MAX_NICS - 1)];
	answer->at = bpf_ktime_get_ns();
	__builtin_memcpy(answer->from.bytes, ethernet->h_source, ETH_ALEN);
	// Last: who sees it counted may see when it came.
	__sync_fetch_and_add(&answer->count, 1);
}

static __always_inline void count(__u32 which)
{
	__u64 *value = bpf_map_lookup_elem(&stats, &which);

	if (value)
		*value += 1;
}

// xdp.frags: jumbo frames in several buffers are welcome; the Ethernet header is in the first.
SEC("xdp.frags")
int vnic(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	struct ethhdr *ethernet = data;
	struct mac_key key = {};
	int action;

	if ((void *)(ethernet + 1) > end)
		goto pass;
	if (ethernet->h_dest[0] & 1)
		goto pass;
	__builtin_memcpy(key.bytes, ethernet->h_dest, ETH_ALEN);
	if (!bpf_map_lookup_elem(&guest_macs, &key)) {
		note_answer(&key, ethernet, end);
		goto pass;
	}
	// XDP_PASS if the queue has no socket.
	action = bpf_redirect_map(&xsks, ctx->rx_queue_index, XDP_PASS);
	if (action == XDP_REDIRECT) {
		count(REDIRECTED);
		return action;
	}
pass:
	count(PASSED);
	return XDP_PASS;
}

// The redirect helper is for programs under a GPL-compatible licence.
char LICENSE[] SEC("license") = "Dual MIT/GPL";
