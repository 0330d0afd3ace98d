// SPDX-License-Identifier: Apache-2.0

package threats

import (
	"fmt"
	"go/ast"
	"go/parser"
	gotoken "go/token"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// row is one threat, what becomes of it, and the tests that show it: functions
// of this package, or "directory.Function" of another.
type row struct {
	name    string
	verdict string
	holds   string
	tests   []string
}

// Verdicts of rows.
const (
	dropped    = "dropped"
	bounded    = "bounded"
	contained  = "contained"   // happens, and changes nothing for others
	refusedRow = "refused"     // the request itself
	exact      = "exact"       // counted to the byte
	gone       = "no way in"   // the sandbox has not what it takes
	notOffered = "not offered" // by Bulkhead; holds says what is true all the same
)

// rows are all threats. The names are those of the threat matrix.
var rows = []row{
	{"E1: VLAN tags for VLAN 0, stacked", dropped, "any tag, in the frame or beside it", []string{"TestE1StackedVLANTags"}},
	{"E2: SYN split over fragments, or behind options", dropped, "fragments and options never pass", []string{"TestE2SplitSYN"}},
	{"E3: allowed port number inside IP options", dropped, "ports are read behind the real header; options never pass", []string{"TestE3PortInsideOptions"}},
	{"E4: frame whose headers are not linear", dropped, "pulled in, then judged as any other; an allowed one passes", []string{"TestE4FrameThatIsNotLinear"}},
	{"E5: checksum offload forged by a packet socket", gone, "the device writes a \"checksum\" over the port after the program has read it. No program sees it come; it takes CAP_NET_RAW, which no process of a sandbox has or can get", []string{"TestForgedChecksumOffload", "runtime/containerd.TestInsidePrivileges", "runtime/containerd.TestInsideForbidden"}},
	{"RA: the host takes a route from a sandbox", dropped, "and the host's end listens to no router", []string{"TestRogueRouter"}},

	{"IPv6 left open", dropped, "no rule for IPv4 matches IPv6", []string{"TestIPv6LeftOpen"}},
	{"v4-mapped IPv6", dropped, "`::/64` never passes; a socket that connects to a mapped address is judged by its IPv4 address", []string{"TestMappedAddresses"}},
	{"IPv4 inside IPv6 (NAT64, 6to4)", dropped, "what is denied as IPv4 is denied where IPv6 carries it", []string{"TestEmbeddedAddresses"}},
	{"Raw and packet sockets", dropped, "the link is the boundary, not the socket", []string{"TestRawSockets"}},
	{"io_uring, unconnected UDP", dropped, "as above; a sandbox has no io_uring besides", []string{"TestUnconnectedUDP", "runtime/containerd.TestSeccomp"}},
	{"Fragments", dropped, "IPv4 and IPv6, whole or atomic, first or last", []string{"TestFragments"}},
	{"IPv4 options", dropped, "a header has 20 bytes", []string{"TestIPv4Options"}},
	{"IPv6 extension headers", dropped, "TCP, UDP or an echo right behind the header", []string{"TestIPv6ExtensionHeaders"}},
	{"Short or truncated", dropped, "a header that is not whole is not read", []string{"TestTruncated"}},
	{"Bad version or length", dropped, "all lengths agree with each other and with the frame", []string{"TestBadVersionOrLength"}},
	{"VLAN, QinQ, priority tag", dropped, "", []string{"TestVLANTags"}},
	{"Other ethertypes", dropped, "no daemon of the host that listens to LLDP, EAPOL and the like hears a sandbox", []string{"TestOtherEthertypes", "netpol/enforce.TestFromSandboxExhaustive"}},
	{"ARP, MAC and IP spoofing", dropped, "and the host's neighbours are permanent", []string{"TestSpoofedSender"}},
	{"NDP, RA, redirects", dropped, "", []string{"TestNeighbourDiscoveryAndRedirects", "TestRogueRouter"}},
	{"DHCP, mDNS, LLMNR, broadcast, multicast", dropped, "before any rule", []string{"TestBroadcastAndMulticast"}},
	{"Metadata services", dropped, "before any rule, and no policy that names one is accepted", []string{"TestMetadataServices"}},
	{"BMC, out-of-band networks", dropped, "link-local always; the operator's own by `host_networks`", []string{"TestManagementNetworks"}},
	{"Host services", dropped, "every address of the host, and again by the input chain", []string{"TestHostServices", "netpol/link.TestHostIsOutOfReach"}},
	{"Cross-sandbox", dropped, "by the sender's program, the forward chain, and the receiver's program alone", []string{"TestSandboxToSandbox"}},
	{"Conntrack poisoning", dropped, "no flow in another's name comes to the tracker", []string{"TestConntrackPoisoning"}},
	{"Conntrack exhaustion", bounded, "`network.max_connections` of each sandbox and family, half open ones counted. Closed ones are not: the kernel gives them up first when its table is full", []string{"TestConntrackExhaustion", "TestConntrackOfClosedConnections"}},
	{"Flow after revoke", dropped, "with its next packet, TCP and UDP", []string{"TestFlowAfterRevoke", "test/e2e.TestReloadCutsALiveFlow"}},
	{"Source-port reuse", dropped, "no verdict outlives the policy that gave it", []string{"TestSourcePortReuse"}},
	{"SYN with payload, TFO, non-SYN first", dropped, "a packet is judged the same whatever its flags", []string{"TestSYNWithPayloadAndFirstACK"}},
	{"ICMP tunnel", bounded, "nothing but echo requests, by a rule: at most 576 bytes, 10 a second", []string{"TestICMPTunnel"}},
	{"SCTP, DCCP, GRE, ESP, IPIP, all other protocols", dropped, "tunnels over UDP need a rule for their port", []string{"TestOtherProtocols"}},
	{"QUIC", dropped, "a rule for 443/tcp is none for 443/udp", []string{"TestQUICNeedsItsOwnRule"}},
	{"SNI tricks", notOffered, "rules name addresses, ports and DNS names; nothing reads TLS. A false server name opens no other address; at an allowed address any server name passes", []string{"TestServerNameDecidesNothing"}},
	{"Other resolver", dropped, "DNS, DoT, DoQ and DoH elsewhere are packets that need a rule", []string{"TestOtherResolver"}},
	{"DNS tunnel", bounded, "a name that no rule allows is refused before it is forwarded; address records only; under a wildcard a bounded number of names", []string{"TestDNSTunnel"}},
	{"DNS poisoning", dropped, "only what the node's upstream answers to its own question opens an address", []string{"TestDNSPoisoning"}},
	{"DNS rebinding", dropped, "special-use addresses are taken out of answers, private ones unless `allow_private`; hard denies come first in any case", []string{"TestDNSRebinding"}},
	{"CDN shared address", notOffered, "an address that a name opens is open for all that it serves; the other name is not resolved, and nothing is open for another sandbox", []string{"TestSharedAddress"}},
	{"TTL 0, rotating names", bounded, "a cap for each name and sandbox; the oldest without a live flow gives way", []string{"TestRotatingName", "netpol/dns.TestRotatingName"}},
	{"Race of start and policy", dropped, "the link is down until the policy is read back", []string{"TestSendingBeforeThePolicy", "test/crash.TestThousandStarts"}},
	{"Agent crash and upgrade", contained, "verdicts and counters go on; no new names while it is gone", []string{"TestAgentDies", "TestResolverDies", "test/crash.TestKilledEverySecond"}},
	{"Pin and name collision", refusedRow, "pins carry ids that are no paths and never repeat", []string{"TestPinNames"}},
	{"Stale attachment", contained, "found by reading the kernel; the agent repairs or cuts off", []string{"TestStaleAttachment", "agent/supervisor.TestDriftIsRepaired", "agent/supervisor.TestDriftThatStaysIsCutOff"}},
	{"bpffs unmounted, program detached", dropped, "what carries no mark is dropped by the second layer; a sandbox cannot set the mark", []string{"TestProgramTakenOff", "TestForgedMark"}},
	{"Map full", refusedRow, "the change fails whole and the old policy stays", []string{"TestMapFull", "netpol/enforce.TestPolicyFull"}},
	{"Empty or broken rule", dropped, "nothing named is nothing matched; what cannot be read is refused", []string{"TestEmptyRule", "netpol.TestRemovingNeverWidens"}},
	{"Broad deny, narrow allow", dropped, "deny wins at every length, whoever wrote it", []string{"TestBroadDenyNarrowAllow"}},
	{"L4 rule hides L7", notOffered, "there are no rules above L4 to hide; a broad allow hides no deny", []string{"TestBroadAllowHidesNoDeny"}},
	{"GSO evades quota", exact, "segments are counted with the headers that they get", []string{"TestSegmentsSpendTheBudget", "netpol/enforce.TestBytesEqualCapture"}},
	{"Device descriptors", gone, "the standard six devices, no mknod", []string{"runtime/containerd.TestInsideDevices", "runtime/containerd.TestInsideForbidden"}},
	{"RDMA, vsock, AF_XDP, io_uring zero copy", gone, "no socket family of theirs, no device node, no capability that they need, no io_uring", []string{"runtime/containerd.TestInsideSockets", "runtime/containerd.TestInsideDevices", "runtime/containerd.TestInsidePrivileges", "runtime/containerd.TestSeccomp"}},
	{"Observability DoS", bounded, "one line for a sandbox, rule, reason and second; no verdict waits for the log", []string{"TestFloodOfDeniedPackets"}},

	{"Published port as a way out", dropped, "only answers leave, to who came, from the port that is published", []string{"TestPublishedPort", "TestPublishedPortInAnothersName", "TestPublishedUDPPort", "netpol/link.TestUnsolicitedIsDropped"}},
	{"Audit as a way out", dropped, "audit lets pass what no rule allows; hard denies and what is not understood stay dropped", []string{"TestAuditKeepsHardDenies"}},
	{"Host address that appears later", dropped, "a remembered verdict does not outlive a change of the hard denies", []string{"TestHostAddressThatAppears"}},
	{"Slot of a sandbox that is gone", dropped, "its policy, names and flows go with it", []string{"TestNextHolderOfASlot", "netpol/link.TestNextHolderInheritsNoFlow"}},
}

const (
	repo     = "../.."
	document = repo + "/docs/threat-model.md"
	begin    = "<!-- rows of test/threats: go test ./test/threats -run TestDocument -update -->\n"
	end      = "<!-- end of rows -->\n"
)

// functions answers the test functions of a package by parsing its files.
func functions(t *testing.T, dir string) (names []string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	must(t, err)
	for _, file := range files {
		f, err := parser.ParseFile(gotoken.NewFileSet(), file, nil, parser.SkipObjectResolution)
		must(t, err)
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && strings.HasPrefix(fn.Name.Name, "Test") {
				names = append(names, fn.Name.Name)
			}
		}
	}
	return names
}

// Every row has tests that exist, and every test has a row.
func TestRowsHaveTests(t *testing.T) {
	known := map[string][]string{}
	used := map[string]bool{}
	seen := map[string]bool{}
	for _, r := range rows {
		if seen[r.name] || r.name == "" || r.verdict == "" || len(r.tests) == 0 {
			t.Errorf("row %q: no name of its own, no verdict or no test", r.name)
		}
		seen[r.name] = true
		for _, test := range r.tests {
			dir, name, other := cutLast(test)
			if other {
				dir = filepath.Join(repo, dir)
			}
			if known[dir] == nil {
				known[dir] = functions(t, dir)
			}
			if !slices.Contains(known[dir], name) {
				t.Errorf("row %q: there is no %s", r.name, test)
			}
			used[test] = true
		}
	}
	for _, name := range functions(t, ".") {
		if !used[name] && !slices.Contains([]string{"TestMain", "TestRowsHaveTests", "TestDocument"}, name) {
			t.Errorf("%s belongs to no row", name)
		}
	}
}

// The threat model lists exactly the rows.
func TestDocument(t *testing.T) {
	text, err := os.ReadFile(document)
	must(t, err)
	before, rest, ok := strings.Cut(string(text), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no lines %q and %q", document, begin, end)
	}
	var table strings.Builder
	table.WriteString("| threat | verdict | what holds | shown by |\n| --- | --- | --- | --- |\n")
	for _, r := range rows {
		var shown []string
		for _, test := range r.tests {
			if dir, name, other := cutLast(test); other {
				test = "`" + dir + "` " + name
			}
			shown = append(shown, test)
		}
		fmt.Fprintf(&table, "| %s | %s | %s | %s |\n", r.name, r.verdict, r.holds, strings.Join(shown, ", "))
	}
	want := before + begin + table.String() + end + after
	if *update {
		must(t, os.WriteFile(document, []byte(want), 0o644))
		return
	}
	if want != string(text) {
		t.Errorf("%s does not list the rows of this package; run go test ./test/threats -run TestDocument -update", document)
	}
}

func cutLast(test string) (dir, name string, other bool) {
	at := strings.LastIndexByte(test, '.')
	if at < 0 {
		return "", test, false
	}
	return test[:at], test[at+1:], true
}
