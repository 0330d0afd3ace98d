// SPDX-License-Identifier: Apache-2.0

// Package link gives every sandbox its network: a named network namespace, a
// veth pair, addresses, routes, permanent neighbours, and the host's NAT and
// second-layer firewall.
//
// It owns, and touches nothing else:
//
//   - the files of Config.NetnsDir: one per sandbox, named by its id, each a
//     bind mount of the namespace;
//   - links named Config.LinkPrefix plus a sandbox id;
//   - the nftables table inet Config.Table, whole;
//   - the conntrack entries that a sandbox address began or answers;
//   - the forwarding sysctls of the host, see Open.
//
// It never attaches programs, decides about packets or picks addresses. It
// runs no other program.
//
// # Shape of a link
//
//	sandbox namespace                     host namespace
//	eth0  02:62:68:<slot>          veth   <prefix><id>  02:62:69:00:00:01
//	  <addr4>/32 <addr6>/128      -----     no address of its own
//	  default via 169.254.1.1 onlink        <addr4>/32 dev <prefix><id>
//	  default via fe80::1     onlink        <addr6>/128 dev <prefix><id>
//	  neighbours: both gateways             neighbours: both addresses
//
// Neighbour entries are permanent and both ends have ARP off, so a link
// carries no ARP and no neighbour discovery: every such packet is an attack
// and may be dropped. The host end has no IPv6 link-local address; fe80::1
// exists only as the sandbox's neighbour entry.
//
// # Order
//
// Create makes everything and leaves the host end down, so nothing can be
// sent. Up is called when the egress program is attached and verified. Up
// adds the host's neighbours and routes, because taking a link down loses
// them.
//
// Inside, lo is up, so that a resolver can listen on the sandbox's own
// loopback. A packet to 127.0.0.0/8 that is put on the link by force ends at
// the host, which drops it.
//
// # Second layer
//
// The table drops what comes from a sandbox link without the mark that the
// egress program sets, so a link whose program is gone has no egress. It also
// drops everything from a sandbox link to the host itself or to another
// sandbox link, and everything to a sandbox link that is not an answer or for
// a published port. Open and Restore replace the rules in one transaction
// inside the existing chains: a packet sees the old rules or the new ones,
// never none. Another table of the host may drop more; it cannot allow more.
//
// # Connection cap
//
// What one sandbox can hold of conntrack is bounded, so that it cannot fill it
// for all. In each family, and once more for what others open to its published
// ports, it gets at most
//
//   - Config.MaxConnections connections at a time, and
//   - Config.NewConnectionsPerSecond new ones, after a burst of MaxConnections.
//
// What is too much is dropped with its first packet and counted for the
// sandbox, see Capped; connections that exist, and answers, are not looked at.
// The kernel counts a TCP connection until both ends have closed it, though
// its entry then waits out TIME_WAIT. For sandboxes that is five seconds, not
// two minutes, and an entry that a reset closed is over at once, so there are
// at most
//
//	2*MaxConnections + 5*NewConnectionsPerSecond
//
// entries in a family and direction: 13192 by default. An entry that is over
// keeps its memory, and its place in nf_conntrack_count, until the kernel
// comes by, which it does more often the more such entries there are, and at
// the latest in a minute; a full table gives them up first. To wait for the
// first answer, conntrack has 15 seconds. All other timeouts of a sandbox's
// connections are those that the host had when Open or Restore last ran; UDP
// has the host's.
//
// A client that opens more than 1000 connections a second for long needs a
// higher rate. Restore and Open give everyone a new burst.
//
// At the cap a sandbox can open nothing for up to 50 ms after a refusal. To
// count costs the more the more connections a sandbox has: about 0.4 µs each,
// at most once a tick of the kernel's clock.
//
// Kernels that forget at most 8 closed connections a tick, as some builds of
// 6.1 do, may cap a sandbox too early that opens and closes thousands a
// second.
//
// # Published ports
//
// Publish redirects connections from elsewhere to a port of the host. What a
// sandbox sends there is not redirected, and dropped as everything that it
// sends to the host; the host's own processes are not redirected either. The
// forward chain lets in exactly the address and port that are published, and
// looks at every packet, so what is no longer published is cut.
//
// # Drift
//
// Verify and VerifyTable read back from the kernel what was made, so that a
// rule, route or sysctl that someone changed is found; see there for what
// repairs it. Both may be called as often as wanted.
//
// # What survives
//
// Everything: namespaces, links, table, published ports and counters outlive
// the process. The addresses of a link are kept in its alias, which is how a
// later process knows them; the published ports are read from the table.
// Open, Create, Up, Publish, Down and Remove are idempotent, and Remove takes
// away whatever part of a sandbox's network is there. Conntrack entries of a
// sandbox are deleted when it is removed, so that the next holder of the
// address does not inherit its flows, and with them what the table counted
// for it; Open deletes those of sandboxes that went while nobody looked. An
// empty element of the sets named connections may stay for a moment: the
// kernel drops it.
//
// The process must live in the host's mount namespace, or containers will not
// find the namespace files.
//
// Lock order: sweeper.running, then sweeper.mu or ruleset.mu, then
// Manager.mu. Calls for different ids may run at the same time; calls for one
// id must not.
package link

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Mark is what the egress program sets on a packet that it allowed, under
// MarkMask.
const (
	Mark     uint32 = 0x62680000
	MarkMask uint32 = 0xffff0000
)

// MarkInbound is set on what comes from outside to a published port, for the
// program at the sandbox's end of the way: it lets answers out to there.
const MarkInbound uint32 = 0x62690000

// The gateways of every sandbox. They exist only in its neighbour table.
var (
	Gateway4 = netip.MustParseAddr("169.254.1.1")
	Gateway6 = netip.MustParseAddr("fe80::1")
)

const (
	idLen      = 12
	maxName    = 15 // IFNAMSIZ less the closing zero
	insideName = "eth0"

	// defaultMTU is that of Ethernet; minMTU is what IPv6 needs.
	defaultMTU = 1500
	minMTU     = 1280
	maxMTU     = 65535

	// defaultConnections is far more than an agent needs, and a small part of
	// what conntrack holds.
	defaultConnections = 4096
	defaultRate        = 1000
	maxRate            = 1e6 // the kernel's limit expression counts nanoseconds
)

// ErrNotFound means that there is no link of that id.
var ErrNotFound = errors.New("link not found")

// Config says what the package owns on this machine. Two managers on one
// machine need different values in every field.
type Config struct {
	// Pool4 and Pool6 hold the sandboxes' addresses. Required.
	Pool4, Pool6 netip.Prefix
	// NetnsDir holds the namespace files; it is made if it is missing. Required.
	NetnsDir string
	// Table is the nftables table in the inet family; "" is "bulkhead".
	Table string
	// LinkPrefix begins the name of every host link; "" is "bh". One to three
	// characters. No prefix may begin with another manager's prefix.
	LinkPrefix string
	// MaxConnections is how many connections a sandbox may hold in each
	// address family, and others with its published ports, before new ones are
	// dropped; 0 is 4096.
	MaxConnections uint32
	// NewConnectionsPerSecond is how fast a sandbox, or others with its
	// published ports, may open connections in each address family, after a
	// burst of MaxConnections; 0 is 1000.
	NewConnectionsPerSecond uint32
}

// Link is the network of one sandbox.
type Link struct {
	ID           string
	Slot         uint32
	Addr4, Addr6 netip.Addr
	MAC          net.HardwareAddr // of the sandbox's end; nil is MACFor(Slot)
	MTU          int              // 0 is 1500; at least 1280
}

// Manager makes and removes the networks of sandboxes.
type Manager struct {
	cfg   Config
	rt    *conn // rtnetlink in the host's namespace
	rules ruleset

	mu   sync.Mutex
	live map[string]owned // +checklocks:mu; links this process saw, by id

	sweeper sweeper

	// fault, if set, may fail the named step. Tests only.
	fault func(step string) error
}

// hostMAC is the hardware address of every host end.
var hostMAC = net.HardwareAddr{0x02, 0x62, 0x69, 0, 0, 1}

// HostMAC is the hardware address of the host's end of every link.
func HostMAC() net.HardwareAddr { return append(net.HardwareAddr(nil), hostMAC...) }

// MACFor is the hardware address of the sandbox in a slot: 02:62:68 and the
// slot in 24 bits.
func MACFor(slot uint32) net.HardwareAddr {
	return net.HardwareAddr{0x02, 0x62, 0x68, byte(slot >> 16), byte(slot >> 8), byte(slot)}
}

// AddrFor is the address of a slot: the pool's base plus the slot. Slot 0,
// the IPv4 broadcast address and slots outside the pool are errors.
func AddrFor(pool netip.Prefix, slot uint32) (netip.Addr, error) {
	if !pool.IsValid() {
		return netip.Addr{}, errors.New("address pool is not set")
	}
	if slot == 0 || slot >= 1<<24 {
		return netip.Addr{}, fmt.Errorf("slot %d has no address", slot)
	}
	host := pool.Addr().BitLen() - pool.Bits()
	last := uint64(1) << min(host, 32)
	if pool.Addr().Is4() {
		last-- // the broadcast address
	}
	if uint64(slot) >= last {
		return netip.Addr{}, fmt.Errorf("slot %d lies outside pool %s", slot, pool)
	}
	b := pool.Masked().Addr().AsSlice()
	carry := uint64(slot)
	for i := len(b) - 1; i >= 0 && carry > 0; i-- {
		carry += uint64(b[i])
		b[i] = byte(carry)
		carry >>= 8
	}
	a, _ := netip.AddrFromSlice(b)
	return a, nil
}

// Open readies the host: the directory, the sysctls, the table, and conntrack.
//
// It turns on net.ipv4.ip_forward and net.ipv6.conf.all.forwarding if they
// are off, and never turns them off again: other software may have come to
// need them. Turning on IPv6 forwarding makes Linux ignore router
// advertisements on interfaces with accept_ra=1; those get accept_ra=2 first,
// so that a host that takes its default route from them keeps it.
//
// Needs root, nftables with NAT in the inet family (Linux 5.2), ct count, ct
// timeout, limit and fib (CONFIG_NF_CONNTRACK_TIMEOUT, and modules
// nft_connlimit, nft_ct, nft_limit and nft_fib_inet), and conntrack over
// netlink (Linux 5.8).
func Open(cfg Config) (*Manager, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.NetnsDir, 0o755); err != nil {
		return nil, fmt.Errorf("make netns directory: %w", err)
	}
	if err := enableForwarding(cfg.LinkPrefix); err != nil {
		return nil, err
	}
	rt, err := dial()
	if err != nil {
		return nil, err
	}
	nf, err := dialProto(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, errors.Join(err, rt.close())
	}
	m := &Manager{cfg: cfg, rt: rt, live: map[string]owned{}}
	m.rules.rd, m.rules.pub = nf, map[string][]Port{}
	if err := m.adopt(); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

// adopt takes up what an earlier process left and removes what belongs to
// sandboxes that went since.
func (m *Manager) adopt() error {
	links, err := m.links()
	if err != nil {
		return err
	}
	keep := map[netip.Addr]bool{}
	m.mu.Lock()
	for _, l := range links {
		id := strings.TrimPrefix(l.name, m.cfg.LinkPrefix)
		if o, err := parseAlias(l.alias); err == nil {
			m.live[id] = o
			keep[o.addr4], keep[o.addr6] = true, true
		}
	}
	m.mu.Unlock()
	if err := m.adoptTable(); err != nil {
		return err
	}
	err = sweepFlows(func(a netip.Addr) bool {
		return !keep[a] && (m.cfg.Pool4.Contains(a) || m.cfg.Pool6.Contains(a))
	})
	if err != nil {
		return err
	}
	return m.sweepNotes(keep)
}

func (m *Manager) adoptTable() error {
	m.rules.mu.Lock()
	defer m.rules.mu.Unlock()
	have, err := m.findTable()
	if err != nil {
		return err
	}
	published, err := m.readPublished(have)
	if err != nil {
		return err
	}
	m.rules.pub = m.byID(published)
	return m.installTable()
}

// known answers the addresses of a sandbox that this process has seen.
func (m *Manager) known(id string) (owned, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	o, ok := m.live[id]
	return o, ok
}

func (c Config) withDefaults() (Config, error) {
	if c.Table == "" {
		c.Table = "bulkhead"
	}
	if c.LinkPrefix == "" {
		c.LinkPrefix = "bh"
	}
	if n := len(c.LinkPrefix); n+idLen > maxName || strings.ContainsAny(c.LinkPrefix, "/ :*\"%") {
		return c, fmt.Errorf("link prefix %q: want one to %d plain characters", c.LinkPrefix, maxName-idLen)
	}
	if c.NetnsDir == "" || !filepath.IsAbs(c.NetnsDir) {
		return c, fmt.Errorf("netns directory %q: want an absolute path", c.NetnsDir)
	}
	if !c.Pool4.IsValid() || !c.Pool4.Addr().Is4() {
		return c, fmt.Errorf("pool4 %s: want an IPv4 prefix", c.Pool4)
	}
	if !c.Pool6.IsValid() || !c.Pool6.Addr().Is6() || c.Pool6.Addr().Is4In6() {
		return c, fmt.Errorf("pool6 %s: want an IPv6 prefix", c.Pool6)
	}
	c.Pool4, c.Pool6 = c.Pool4.Masked(), c.Pool6.Masked()
	if c.MaxConnections == 0 {
		c.MaxConnections = defaultConnections
	}
	if c.NewConnectionsPerSecond == 0 {
		c.NewConnectionsPerSecond = defaultRate
	}
	if c.NewConnectionsPerSecond > maxRate {
		return c, fmt.Errorf("new connections per second %d: want at most %d", c.NewConnectionsPerSecond, int(maxRate))
	}
	return c, nil
}

func (m *Manager) check(l Link) (Link, error) {
	if !validID(l.ID) {
		return l, fmt.Errorf("sandbox id %q: want %d characters of a-z and 2-7", l.ID, idLen)
	}
	if !m.cfg.Pool4.Contains(l.Addr4) {
		return l, fmt.Errorf("address %s of %s lies outside pool %s", l.Addr4, l.ID, m.cfg.Pool4)
	}
	if !m.cfg.Pool6.Contains(l.Addr6) || l.Addr6.Zone() != "" {
		return l, fmt.Errorf("address %s of %s lies outside pool %s", l.Addr6, l.ID, m.cfg.Pool6)
	}
	if l.MAC == nil {
		l.MAC = MACFor(l.Slot)
	}
	if len(l.MAC) != 6 || l.MAC[0]&1 != 0 {
		return l, fmt.Errorf("hardware address %s of %s: want six bytes, unicast", l.MAC, l.ID)
	}
	if l.MTU == 0 {
		l.MTU = defaultMTU
	}
	if l.MTU < minMTU || l.MTU > maxMTU {
		return l, fmt.Errorf("mtu %d of %s: want %d to %d", l.MTU, l.ID, minMTU, maxMTU)
	}
	return l, nil
}

// validID reports whether s can be a sandbox id.
func validID(s string) bool {
	if len(s) != idLen {
		return false
	}
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < '2' || c > '7') {
			return false
		}
	}
	return true
}

// NetnsPath is the file that holds the namespace of a sandbox.
func (m *Manager) NetnsPath(id string) string { return filepath.Join(m.cfg.NetnsDir, id) }

// HostName is the name of the host's end of a sandbox's link.
func (m *Manager) HostName(id string) string { return m.cfg.LinkPrefix + id }

// Close leaves everything in place and frees what the manager holds open.
func (m *Manager) Close() error { return errors.Join(m.rt.close(), m.rules.rd.close()) }

func (m *Manager) failpoint(step string) error {
	if m.fault == nil {
		return nil
	}
	return m.fault(step)
}
