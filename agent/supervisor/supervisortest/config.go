// SPDX-License-Identifier: Apache-2.0

package supervisortest

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/bulkheadhq/bulkhead/agent/admit"
	"github.com/bulkheadhq/bulkhead/agent/place"
	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/agent/supervisor"
	"github.com/bulkheadhq/bulkhead/tenant"
)

// Boot is the boot id of a Config, and Source that of its usage records.
const (
	Boot   = "boot-1"
	NodeID = "0f0e0d0c-0000-4000-8000-000000000001"
	Source = "node/" + NodeID + "/boot/" + Boot
)

// Config answers the configuration of a supervisor that works on p and keeps
// the logs of its sandboxes below dir.
func (p *Process) Config(dir string, tenants *tenant.Set, spool supervisor.Spool) supervisor.Config {
	logs := filepath.Join(dir, "logs")
	return supervisor.Config{
		Log: slog.New(slog.DiscardHandler),
		Place: place.Node{
			Pool4: netip.MustParsePrefix("100.96.0.0/16"), Pool6: netip.MustParsePrefix("fd62:6b68::/64"),
			MTU: 1500, LogRoot: logs,
			Addr: addr,
			MAC: func(slot uint32) net.HardwareAddr {
				return net.HardwareAddr{2, 0x62, 0x68, 0, byte(slot >> 8), byte(slot)}
			},
			HostLink: func(id string) string { return "bh" + id },
			Netns:    func(id string) string { return filepath.Join(dir, "netns", id) },
			Cgroup:   func(t, id string) string { return filepath.Join("bulkhead.slice", t, id) },
		},
		Defaults:     sandbox.Limits{CPUMillis: 100, MemoryBytes: 64 << 20, PIDs: 32},
		Biggest:      sandbox.Limits{CPUMillis: 4000, MemoryBytes: 8 << 30, PIDs: 4096},
		Capacity:     tenant.Quota{CPUMillis: 400000, MemoryBytes: 800 << 30},
		PublishPorts: admit.Ports{Lo: 30000, Hi: 30099},
		MaxSlot:      1024,
		LogMaxBytes:  1 << 20,
		LogFiles:     2,
		Interval:     time.Second,
		VerifyEvery:  5 * time.Second,
		Grace:        2 * time.Second,
		BootID:       Boot,
		Source:       Source,
		Tenants:      tenants,
		Store:        p.Store(),
		Links:        p.Links(),
		Names:        p.Names(),
		Budgets:      p.Budgets(),
		Egress:       p.Egress(),
		Cgroups:      p.Cgroups(),
		Runtime:      p.Runtime(),
		Spool:        p.Spool(spool),
		RemoveLog:    func(id string) error { return os.RemoveAll(filepath.Join(logs, id)) },
		BootTime:     p.m.BootTime,
		LingerRemove: 400 * time.Millisecond,
		KeepStopped:  1000,
	}
}

// addr is the slot-th address of a pool.
func addr(pool netip.Prefix, slot uint32) (netip.Addr, error) {
	if slot > 1<<16-2 {
		return netip.Addr{}, fmt.Errorf("slot %d is beyond %s", slot, pool)
	}
	b := pool.Addr().AsSlice()
	b[len(b)-2], b[len(b)-1] = byte(slot>>8), byte(slot)
	a, _ := netip.AddrFromSlice(b)
	return a, nil
}
