// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"fmt"

	"github.com/bulkheadhq/bulkhead/bpf"
)

// reason is why the datapath dropped a packet; 0 if it did not.
type reason = bpf.DatapathBhReason

const (
	allowed       = bpf.DatapathBhReasonBH_ALLOWED
	denyHost      = bpf.DatapathBhReasonBH_HOST
	denyNetwork   = bpf.DatapathBhReasonBH_HOST_NETWORK
	denySandbox   = bpf.DatapathBhReasonBH_SANDBOX
	reasonCount   = bpf.DatapathBhReasonBH_REASONS
	reasonNoAddr  = "no_address"
	detailNoAddr4 = "the sandbox has no IPv4 address"
	detailNoAddr6 = "the sandbox has no IPv6 address"
)

// reasons names every reason and says what it means. The names are those of
// netpol where netpol has one; they are used in usage, metrics and explain.
var reasons = [reasonCount]struct{ name, detail string }{
	bpf.DatapathBhReasonBH_ALLOWED:      {"allow", "an allow rule matches"},
	bpf.DatapathBhReasonBH_UNKNOWN_LINK: {"unknown_link", "the link belongs to no sandbox"},
	bpf.DatapathBhReasonBH_VLAN:         {"vlan", "VLAN tags never pass"},
	bpf.DatapathBhReasonBH_ARP:          {"arp", "neighbours are static; ARP never passes"},
	bpf.DatapathBhReasonBH_ETHERTYPE:    {"ethertype", "neither IPv4 nor IPv6"},
	bpf.DatapathBhReasonBH_SHORT:        {"short", "the frame ends inside a header"},
	bpf.DatapathBhReasonBH_BAD_VERSION:  {"bad_version", "the IP version contradicts the ethertype"},
	bpf.DatapathBhReasonBH_BAD_LENGTH:   {"bad_length", "lengths in the headers contradict each other or the frame"},
	bpf.DatapathBhReasonBH_IP_OPTIONS:   {"ip_options", "IPv4 options never pass"},
	bpf.DatapathBhReasonBH_FRAGMENT:     {"fragment", "fragments never pass"},
	bpf.DatapathBhReasonBH_EXT_HEADER:   {"ext_header", "IPv6 extension headers never pass"},
	bpf.DatapathBhReasonBH_PROTOCOL:     {"protocol", "only TCP, UDP and ICMP echo can be allowed"},
	bpf.DatapathBhReasonBH_ICMP:         {"icmp", "no ICMP but echo requests can be allowed"},
	bpf.DatapathBhReasonBH_ICMP6:        {"icmp6", "no ICMPv6 but echo requests can be allowed"},
	bpf.DatapathBhReasonBH_NEIGHBOUR:    {"neighbour", "neighbours are static; neighbour and listener discovery never passes"},

	bpf.DatapathBhReasonBH_SPOOF_MAC: {"spoof_mac", "the source MAC is not the sandbox's"},
	bpf.DatapathBhReasonBH_SPOOF_IP:  {"spoof_ip", "the source address is not the sandbox's"},

	bpf.DatapathBhReasonBH_MAPPED:       {"v4_mapped", "IPv4 addresses inside IPv6 never pass"},
	bpf.DatapathBhReasonBH_METADATA:     {"metadata", "cloud metadata services cannot be allowed"},
	bpf.DatapathBhReasonBH_LINK_LOCAL:   {"link_local", "link-local addresses cannot be allowed"},
	bpf.DatapathBhReasonBH_LOOPBACK:     {"loopback", "loopback addresses cannot be allowed"},
	bpf.DatapathBhReasonBH_MULTICAST:    {"multicast", "multicast cannot be allowed"},
	bpf.DatapathBhReasonBH_BROADCAST:    {"broadcast", "broadcast cannot be allowed"},
	bpf.DatapathBhReasonBH_UNSPECIFIED:  {"unspecified", "the unspecified network cannot be allowed"},
	bpf.DatapathBhReasonBH_RESERVED:     {"reserved", "reserved addresses cannot be allowed"},
	bpf.DatapathBhReasonBH_HOST:         {"host", "addresses of the node cannot be allowed"},
	bpf.DatapathBhReasonBH_HOST_NETWORK: {"host_network", "the operator denies this network on this node"},
	bpf.DatapathBhReasonBH_SANDBOX:      {"sandbox", "other sandboxes cannot be allowed"},

	bpf.DatapathBhReasonBH_NO_POLICY:       {"no_policy", "the sandbox has no policy yet"},
	bpf.DatapathBhReasonBH_NO_RULE_MATCHED: {"no_rule", "no rule allows it"},
	bpf.DatapathBhReasonBH_RULE_DENY:       {"rule_deny", "a deny rule matches"},

	bpf.DatapathBhReasonBH_RATE:      {"rate", "a rate limit of the rule, the sandbox or a tenant is reached"},
	bpf.DatapathBhReasonBH_BUDGET:    {"budget", "a budget of the sandbox or a tenant is spent"},
	bpf.DatapathBhReasonBH_ECHO_SIZE: {"echo_size", "an ICMP echo of more than 576 bytes never passes"},
	bpf.DatapathBhReasonBH_ECHO_RATE: {"echo_rate", "more than 10 ICMP echoes a second"},

	bpf.DatapathBhReasonBH_IN_MALFORMED:   {"in_malformed", "towards the sandbox: headers cannot be read"},
	bpf.DatapathBhReasonBH_IN_NOT_IP:      {"in_not_ip", "towards the sandbox: neither IPv4 nor IPv6"},
	bpf.DatapathBhReasonBH_IN_DESTINATION: {"in_destination", "towards the sandbox: not an address of the sandbox"},
	bpf.DatapathBhReasonBH_IN_SANDBOX:     {"in_sandbox", "towards the sandbox: sent by another sandbox"},
	bpf.DatapathBhReasonBH_IN_SOURCE:      {"in_source", "towards the sandbox: special-use source address"},
}

func reasonName(r reason) string {
	if r < reasonCount {
		return reasons[r].name
	}
	return fmt.Sprintf("reason_%d", r)
}

func reasonDetail(r reason) string {
	if r < reasonCount {
		return reasons[r].detail
	}
	return ""
}

// reasonOf is the inverse of reasonName.
func reasonOf(name string) (reason, bool) {
	for i := range reasons {
		if reasons[i].name == name {
			return reason(i), true
		}
	}
	return 0, false
}
