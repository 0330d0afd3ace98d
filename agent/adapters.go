// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"

	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/agent/supervisor"
	"github.com/bulkheadhq/bulkhead/cgroups"
	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/netpol/enforce"
	"github.com/bulkheadhq/bulkhead/netpol/link"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
	"github.com/bulkheadhq/bulkhead/tenant"
)

// links makes a link.Manager serve the supervisor.
type links struct{ *link.Manager }

func (l links) Create(ctx context.Context, id string, p sandbox.Plan) (int, error) {
	mac, err := net.ParseMAC(p.MAC)
	if err != nil {
		return 0, fmt.Errorf("plan of sandbox %s: %w", id, err)
	}
	return l.Manager.Create(ctx, link.Link{ID: id, Slot: p.Slot, Addr4: p.Addr4, Addr6: p.Addr6, MAC: mac, MTU: p.MTU})
}

// Down answers fs.ErrNotExist for a link that is not there.
func (l links) Down(id string) error {
	err := l.Manager.Down(id)
	if errors.Is(err, link.ErrNotFound) {
		return fmt.Errorf("%w: %w", err, fs.ErrNotExist)
	}
	return err
}

func (l links) Publish(id string, ports []sandbox.Port) error {
	out := make([]link.Port, len(ports))
	for i, p := range ports {
		out[i] = link.Port{Host: p.Host, Sandbox: p.Sandbox, Proto: uint8(p.Proto)}
	}
	return l.Manager.Publish(id, out)
}

// Connections implements api.Links.
func (l links) Connections(id string) (refused uint64, err error) { return l.Capped(id) }

// egress makes an enforce.Enforcer serve the supervisor and the API.
type egress struct{ *enforce.Enforcer }

func (e egress) Attach(ctx context.Context, x supervisor.Enforcement) error {
	mac, err := net.ParseMAC(x.Plan.MAC)
	if err != nil {
		return fmt.Errorf("plan of sandbox %s: %w", x.ID, err)
	}
	return e.Enforcer.Attach(ctx, enforce.Sandbox{
		ID: x.ID, Slot: x.Plan.Slot, Ifindex: x.Ifindex, MAC: mac,
		Addrs:   []netip.Addr{x.Plan.Addr4, x.Plan.Addr6},
		Program: x.Program, PolicyRev: x.Rev, Learned: x.Learned,
	})
}

func (e egress) Traffic(slot uint32) (supervisor.Traffic, error) {
	c, err := e.Counters(slot)
	return supervisor.Traffic{EgressBytes: c.EgressBytes, IngressBytes: c.IngressBytes}, err
}

// Network implements api.Traffic.
func (e egress) Network(slot uint32) (*nodev1.Network, []*nodev1.DropCounter, error) {
	c, err := e.Counters(slot)
	if err != nil {
		return nil, nil, err
	}
	out := &nodev1.Network{
		EgressBytes: c.EgressBytes, EgressPackets: c.EgressPackets, EgressWireBytes: c.EgressWireBytes,
		IngressBytes: c.IngressBytes, IngressPackets: c.IngressPackets, IngressWireBytes: c.IngressWireBytes,
	}
	var drops []*nodev1.DropCounter
	for _, d := range c.Drops {
		out.DroppedBytes += d.Bytes
		out.DroppedPackets += d.Packets
		drops = append(drops, &nodev1.DropCounter{Reason: d.Reason, Packets: d.Packets, Bytes: d.Bytes})
	}
	return out, drops, nil
}

// Rules implements api.Traffic.
func (e egress) Rules(id string, slot uint32) ([]*nodev1.RuleCounter, error) {
	rules, err := e.RuleCounters(id, slot)
	var out []*nodev1.RuleCounter
	for _, r := range rules {
		out = append(out, &nodev1.RuleCounter{Tenant: r.Tenant, Rule: r.Rule, Packets: r.Packets, Bytes: r.Bytes})
	}
	return out, err
}

// Explain implements api.Traffic.
func (e egress) Explain(slot uint32, f netpol.Flow) (*nodev1.ExplainResponse, error) {
	x, err := e.Enforcer.Explain(slot, f)
	if err != nil {
		return nil, err
	}
	return &nodev1.ExplainResponse{
		Allowed: x.Allowed, Reason: x.Reason, Rule: x.Rule, Tenant: x.Tenant, Detail: x.Detail, PolicyRev: x.PolicyRev,
		Audit: x.Audit,
	}, nil
}

// tree makes a cgroups.Tree serve the supervisor.
type tree struct{ *cgroups.Tree }

func (t tree) Ensure(path string, q tenant.Quota) error {
	return t.Tree.Ensure(path, cgroups.Limits{CPUMillis: q.CPUMillis, MemoryBytes: q.MemoryBytes, PIDs: q.PIDs})
}

func (t tree) Usage(tenant, id string) (supervisor.CgroupUsage, error) {
	st, err := t.Stat(tenant, id)
	if err != nil {
		return supervisor.CgroupUsage{}, err
	}
	cpu := st.CPUUsec * 1000
	return supervisor.CgroupUsage{CPUNs: &cpu, MemoryUsed: st.MemoryCurrent, OOMKills: st.OOMKills}, nil
}

func (t tree) List() ([]string, error) {
	leaves, err := t.Tree.List()
	var ids []string
	for _, l := range leaves {
		ids = append(ids, l.ID)
	}
	return ids, err
}
