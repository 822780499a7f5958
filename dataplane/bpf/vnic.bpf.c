// SPDX-License-Identifier: MIT OR GPL-2.0-only
// The XDP program on each NIC: frames to a guest's MAC address go to the AF_XDP socket of their queue, all others
// to the host as if nothing were here. One copy is loaded per NIC.
//
// Group addresses (broadcast, multicast) are passed, too: XDP cannot clone, and the host needs them. The daemon takes its
// copy of those from an AF_PACKET socket (src/group.rs).
#include <linux/bpf.h>
#include <linux/if_ether.h>
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
	if (!bpf_map_lookup_elem(&guest_macs, &key))
		goto pass;
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
