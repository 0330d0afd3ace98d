// SPDX-License-Identifier: Apache-2.0

// Package admit decides whether a sandbox may start: is its tenant known, is
// there room under every quota from its organisation down to itself, has the
// node room at all, and are the node's ports that it wants published free. It
// is pure. A refusal is a value that names the limit,
// what is in use, what was wanted and who set it; it is not a failure.
package admit

import (
	"fmt"

	"github.com/docker/go-units"

	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/tenant"
)

// Reason of a refusal.
type Reason string

// The reasons.
const (
	TenantUnknown Reason = "tenant_unknown"
	Quota         Reason = "quota"
	NodeCapacity  Reason = "node_capacity"
	UsageSpool    Reason = "usage_spool"  // nothing may start that cannot be metered
	PublishPort   Reason = "publish_port" // a port of the node is not to be had
)

// Resource names, as in Denied.Resource.
const (
	CPU       = "cpu_millis"
	Memory    = "memory_bytes"
	PIDs      = "pids"
	Sandboxes = "sandboxes"
	HostPort  = "host_port"
)

// Denied is a refusal. Quantities are in the resource's own unit.
type Denied struct {
	Reason   Reason
	Resource string
	Limit    int64
	InUse    int64
	Want     int64
	Tenant   tenant.Path // who asked
	SetBy    string      // tenant whose limit it is, or "node"
	File     string      // where it is written; empty for the node's own capacity
	Hint     string      // for reasons without a quantity
}

// Error makes a refusal usable where an error is expected.
func (d *Denied) Error() string {
	switch d.Reason {
	case TenantUnknown:
		return fmt.Sprintf("tenant %s is not known here%s", d.Tenant, d.Hint)
	case UsageSpool:
		return "no sandbox may start that cannot be metered: " + d.Hint
	case PublishPort:
		return fmt.Sprintf("port %d of the node cannot be published for %s: %s", d.Want, d.Tenant, d.Hint)
	}
	where := ""
	if d.File != "" {
		where = " in " + d.File
	}
	return fmt.Sprintf("no room for %s: %s %s wanted, %s of %s in use (limit set by %s%s)",
		d.Tenant, label(d.Resource), Amount(d.Resource, d.Want), Amount(d.Resource, d.InUse), Amount(d.Resource, d.Limit), d.SetBy, where)
}

func label(resource string) string {
	switch resource {
	case CPU:
		return "cpu"
	case Memory:
		return "memory"
	}
	return resource
}

// Amount prints a quantity of a resource for people.
func Amount(resource string, v int64) string {
	switch resource {
	case CPU:
		return fmt.Sprintf("%g", float64(v)/1000)
	case Memory:
		return units.BytesSize(float64(v))
	}
	return fmt.Sprint(v)
}

// Claim is what one live sandbox holds.
type Claim struct {
	Tenant  tenant.Path
	Name    string // of the sandbox
	Limits  sandbox.Limits
	Publish []sandbox.Port
}

// Ports is a range of the node's ports, both ends included. The zero Ports
// holds none.
type Ports struct{ Lo, Hi uint16 }

func (p Ports) contains(port uint16) bool { return port != 0 && p.Lo <= port && port <= p.Hi }

// Node is what the node has to give, and whether it may.
type Node struct {
	Capacity     tenant.Quota            // 0: no bound
	PublishPorts Ports                   // those that sandboxes may publish
	Listens      func(sandbox.Port) bool // optional: whether a service of the node has a port
	SpoolFull    string                  // not empty: why usage cannot be recorded now
}

// Sum adds up what a tenant and all below it hold. The empty path sums all.
func Sum(of tenant.Path, claims []Claim) tenant.Quota {
	var q tenant.Quota
	for _, c := range claims {
		if of == "" || of.Contains(c.Tenant) {
			q.CPUMillis += c.Limits.CPUMillis
			q.MemoryBytes += c.Limits.MemoryBytes
			q.PIDs += c.Limits.PIDs
			q.Sandboxes++
		}
	}
	return q
}

// Decide answers nil if want may start, or why not. The organisation is asked
// before the team, and the node last, so the widest limit that is in the way
// is the one that is named.
func Decide(set *tenant.Set, node Node, claims []Claim, want Claim) *Denied {
	chain := set.Chain(want.Tenant)
	if len(chain) == 0 {
		return &Denied{Reason: TenantUnknown, Tenant: want.Tenant, Hint: hint(set, want.Tenant)}
	}
	if node.SpoolFull != "" {
		return &Denied{Reason: UsageSpool, Tenant: want.Tenant, Hint: node.SpoolFull}
	}
	for _, t := range chain {
		if d := over(t.Quota, Sum(t.Path, claims), want); d != nil {
			d.Reason, d.SetBy, d.File = Quota, string(t.Path), t.File
			return d
		}
	}
	if d := over(node.Capacity, Sum("", claims), want); d != nil {
		d.Reason, d.SetBy = NodeCapacity, "node"
		return d
	}
	return published(node, claims, want)
}

// published answers why a port that want publishes is not to be had.
func published(node Node, claims []Claim, want Claim) *Denied {
	may := node.PublishPorts
	for _, p := range want.Publish {
		d := &Denied{Reason: PublishPort, Resource: HostPort, Want: int64(p.Host), Tenant: want.Tenant, SetBy: "node"}
		switch holder := holderOf(p, claims); {
		case may == Ports{}:
			d.Hint = "this node publishes none; its operator can set network.publish_ports"
		case !may.contains(p.Host):
			d.Hint = fmt.Sprintf("this node publishes %d-%d (network.publish_ports)", may.Lo, may.Hi)
		case holder == nil && node.Listens != nil && node.Listens(p):
			d.Hint = "a service of the node listens there"
		case holder == nil:
			continue
		case want.Tenant.Contains(holder.Tenant):
			d.Hint = fmt.Sprintf("sandbox %s of %s has it", holder.Name, holder.Tenant)
		default: // whose it is, is not the caller's business
			d.Hint = "a sandbox of another tenant has it"
		}
		return d
	}
	return nil
}

func holderOf(p sandbox.Port, claims []Claim) *Claim {
	for i := range claims {
		for _, q := range claims[i].Publish {
			if q.Host == p.Host && q.Proto == p.Proto {
				return &claims[i]
			}
		}
	}
	return nil
}

// over answers the first resource of which there is not enough.
func over(limit, inUse tenant.Quota, want Claim) *Denied {
	for _, r := range []struct {
		name               string
		limit, inUse, want int64
	}{
		{Sandboxes, limit.Sandboxes, inUse.Sandboxes, 1},
		{CPU, limit.CPUMillis, inUse.CPUMillis, want.Limits.CPUMillis},
		{Memory, limit.MemoryBytes, inUse.MemoryBytes, want.Limits.MemoryBytes},
		{PIDs, limit.PIDs, inUse.PIDs, want.Limits.PIDs},
	} {
		if r.limit > 0 && r.want > r.limit-r.inUse {
			return &Denied{Resource: r.name, Limit: r.limit, InUse: r.inUse, Want: r.want, Tenant: want.Tenant}
		}
	}
	return nil
}

func hint(set *tenant.Set, path tenant.Path) string {
	all := set.All()
	if len(all) == 0 {
		return ": no tenant is; write one into the tenants directory and run `bulkhead reload`"
	}
	for _, t := range all {
		if t.Path.Contains(path) {
			return fmt.Sprintf(": %s is, see `bulkhead tenant ls`", t.Path)
		}
	}
	return ": see `bulkhead tenant ls`"
}
