// SPDX-License-Identifier: Apache-2.0

package rig

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Inventory counts what the sandboxes of the rig have on the machine, by kind.
// What is zero is left out, so an empty one says that nothing is left of any.
func (r *Rig) Inventory() (map[string]int, error) {
	count := map[string]int{}
	links, err := netlink.LinkList()
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		if isOurs(l.Attrs().Name) && l.Attrs().Name[:len(LinkPrefix)] == LinkPrefix {
			count["links"]++
		}
	}
	for _, pool := range []string{Pool4, Pool6} {
		if err := countAddresses(count, netip.MustParsePrefix(pool)); err != nil {
			return nil, err
		}
	}
	if err := countElements(count); err != nil {
		return nil, err
	}
	for kind, dir := range map[string]string{
		"network namespaces": filepath.Join(r.Dir, "run", "netns"),
		"pins":               filepath.Join(r.pinDir(), "v2", "links"),
		"resolver journals":  filepath.Join(r.Dir, "run", "dns"),
	} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if len(entries) > 0 {
			count[kind] = len(entries)
		}
	}
	return count, nil
}

// countAddresses counts routes, neighbours and connections of a pool.
func countAddresses(count map[string]int, pool netip.Prefix) error {
	family, table := netlink.FAMILY_V4, netlink.InetFamily(unix.AF_INET)
	if pool.Addr().Is6() {
		family, table = netlink.FAMILY_V6, netlink.InetFamily(unix.AF_INET6)
	}
	holds := func(ip []byte) bool {
		a, ok := netip.AddrFromSlice(ip)
		return ok && pool.Contains(a.Unmap())
	}
	routes, err := netlink.RouteList(nil, family)
	if err != nil {
		return err
	}
	for _, rt := range routes {
		if rt.Dst != nil && holds(rt.Dst.IP) {
			count["routes"]++
		}
	}
	neighbours, err := netlink.NeighList(0, family)
	if err != nil {
		return err
	}
	for _, n := range neighbours {
		if holds(n.IP) {
			count["neighbours"]++
		}
	}
	flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, table)
	if err != nil {
		return fmt.Errorf("read connections: %w", err)
	}
	for _, f := range flows {
		if holds(f.Forward.SrcIP) {
			count["connections"]++
		}
	}
	return nil
}

// countElements counts elements of the agent's nft sets and maps that name an
// address of the pools; what the table holds by itself is not a sandbox's.
func countElements(count map[string]int) error {
	conn := &nftables.Conn{}
	table := &nftables.Table{Name: NFTable, Family: nftables.TableFamilyINet}
	sets, err := conn.GetSets(table)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read nft sets: %w", err)
	}
	for _, s := range sets {
		elements, err := conn.GetSetElements(s)
		if err != nil {
			return fmt.Errorf("read nft set %s: %w", s.Name, err)
		}
		for _, e := range elements {
			if inPools(e.Key) || inPools(e.Val) {
				count["nft elements"]++
			}
		}
	}
	return nil
}

// inPools says whether a key or value begins with an address of the pools. A
// whole pool as an interval's end is not one.
func inPools(b []byte) bool {
	for _, pool := range []netip.Prefix{netip.MustParsePrefix(Pool4), netip.MustParsePrefix(Pool6)} {
		n := pool.Addr().BitLen() / 8
		if len(b) < n {
			continue
		}
		if a, ok := netip.AddrFromSlice(b[:n]); ok && pool.Contains(a) && a != pool.Addr() {
			return true
		}
	}
	return false
}
