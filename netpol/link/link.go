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
//   - the conntrack entries whose source is a sandbox address;
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
// # Second layer
//
// The table drops what comes from a sandbox link without the mark that the
// egress program sets, so a link whose program is gone has no egress. It also
// drops everything from a sandbox link to the host itself or to another
// sandbox link, and everything to a sandbox link that is not an answer. Open
// replaces the rules in one transaction inside the existing chains: a packet
// sees the old rules or the new ones, never none. Another table of the host
// may drop more; it cannot allow more.
//
// # What survives
//
// Everything: namespaces, links, table and counters outlive the process. The
// addresses of a link are kept in its alias, which is how a later process
// knows them. Open, Create, Up, Down and Remove are idempotent, and Remove
// takes away whatever part of a sandbox's network is there. Conntrack entries
// of a sandbox are deleted when it is removed, so that the next holder of the
// address does not inherit its flows; Open deletes those of sandboxes that
// went while nobody looked.
//
// The process must live in the host's mount namespace, or containers will not
// find the namespace files.
//
// Lock order: sweeper.running, then sweeper.mu; no other lock is taken under
// another. Calls for different ids may run at
// the same time; calls for one id must not.
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

	"github.com/google/nftables"
)

// Mark is what the egress program sets on a packet that it allowed, under
// MarkMask.
const (
	Mark     uint32 = 0x62680000
	MarkMask uint32 = 0xffff0000
)

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
	cfg  Config
	rt   *conn // rtnetlink in the host's namespace
	nftc *nftables.Conn

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
// Needs root, nftables with NAT in the inet family (Linux 5.2) and conntrack
// over netlink (Linux 5.8).
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
	m := &Manager{cfg: cfg, rt: rt, nftc: &nftables.Conn{}, live: map[string]owned{}}
	if err := m.adopt(); err != nil {
		return nil, errors.Join(err, rt.close())
	}
	return m, nil
}

func (m *Manager) adopt() error {
	if err := m.installTable(); err != nil {
		return err
	}
	links, err := m.links()
	if err != nil {
		return err
	}
	keep := map[netip.Addr]bool{}
	for _, l := range links {
		id := strings.TrimPrefix(l.name, m.cfg.LinkPrefix)
		if o, err := parseAlias(l.alias); err == nil {
			m.live[id] = o
			keep[o.addr4], keep[o.addr6] = true, true
		}
	}
	return sweepFlows(func(a netip.Addr) bool {
		return !keep[a] && (m.cfg.Pool4.Contains(a) || m.cfg.Pool6.Contains(a))
	})
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
func (m *Manager) Close() error { return m.rt.close() }

func (m *Manager) failpoint(step string) error {
	if m.fault == nil {
		return nil
	}
	return m.fault(step)
}
