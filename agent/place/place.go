// SPDX-License-Identifier: Apache-2.0

// Package place decides where a sandbox goes on the node: its addresses, its
// link, its namespace, its cgroup, its log. It is pure and answers a Plan,
// which the store keeps: what was decided once is what every later step and
// every recovery uses.
package place

import (
	"fmt"
	"net"
	"net/netip"
	"path/filepath"

	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/tenant"
)

// Node is what placement needs to know of the node. Addr, MAC, HostLink and
// Netns are the network's own rules, handed in so that this package touches
// no machine.
type Node struct {
	Pool4, Pool6 netip.Prefix
	MTU          int
	LogRoot      string // one directory per sandbox is made below it
	Addr         func(pool netip.Prefix, slot uint32) (netip.Addr, error)
	MAC          func(slot uint32) net.HardwareAddr
	HostLink     func(id string) string
	Netns        func(id string) string
	Cgroup       func(tenant, id string) string
}

// Place answers the plan of sandbox id in a slot. It errs if the slot is not
// one, or beyond a pool.
func Place(n Node, id string, path tenant.Path, slot uint32) (sandbox.Plan, error) {
	if slot == 0 {
		return sandbox.Plan{}, fmt.Errorf("place %s: slot 0 is never used", id)
	}
	a4, err := n.Addr(n.Pool4, slot)
	if err != nil {
		return sandbox.Plan{}, fmt.Errorf("place %s: %w", id, err)
	}
	a6, err := n.Addr(n.Pool6, slot)
	if err != nil {
		return sandbox.Plan{}, fmt.Errorf("place %s: %w", id, err)
	}
	return sandbox.Plan{
		Slot:       slot,
		Addr4:      a4,
		Addr6:      a6,
		MAC:        n.MAC(slot).String(),
		MTU:        n.MTU,
		HostLink:   n.HostLink(id),
		NetnsPath:  n.Netns(id),
		CgroupPath: n.Cgroup(string(path), id),
		LogDir:     filepath.Join(n.LogRoot, id),
	}, nil
}
