// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Where our filters are: the first place of the chain, always the same, so that
// attaching again replaces and does not add.
const (
	clsactPriority = 1
	clsactHandle   = 1
)

// clsact puts programs on links on kernels before 6.6: as direct-action filters
// of a clsact qdisc. A program that answers TCX_NEXT lets the next filter
// decide there, too.
//
// A filter belongs to its link and stays when this process dies. What says that
// it is ours is a pin of its program under links/<id>/HOOK_IFINDEX: nothing
// else in the kernel remembers the link once the slot is given up. All methods
// must run in the network namespace of the links.
type clsact struct{ e *Enforcer }

func (clsact) name() string { return "clsact" }

func (c clsact) pin(id string, h hook, ifindex int) string {
	return filepath.Join(c.e.linkDir(id), h.pin+"_"+strconv.Itoa(ifindex))
}

// pins answers the links that the sandbox's hook has pins for.
func (c clsact) pins(id string, h hook) (ifindexes []int, err error) {
	entries, err := os.ReadDir(c.e.linkDir(id))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list pins: %w", err)
	}
	for _, d := range entries {
		number, ok := strings.CutPrefix(d.Name(), h.pin+"_")
		if !ok {
			continue
		}
		ifindex, err := strconv.Atoi(number)
		if err != nil {
			return nil, fmt.Errorf("pin %s: %w", d.Name(), err)
		}
		ifindexes = append(ifindexes, ifindex)
	}
	return ifindexes, nil
}

// parent is where the hook's filters hang.
func (h hook) parent() uint32 {
	if h.attach == ebpf.AttachTCXIngress {
		return netlink.HANDLE_MIN_INGRESS
	}
	return netlink.HANDLE_MIN_EGRESS
}

func (h hook) filter(ifindex int) *netlink.BpfFilter {
	return &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: ifindex, Parent: h.parent(),
			Handle: clsactHandle, Priority: clsactPriority, Protocol: unix.ETH_P_ALL,
		},
		Fd: h.prog.FD(), Name: "bulkhead_" + h.pin, DirectAction: true,
	}
}

// attach makes the hook's program the first filter of the link. Where it runs
// already, perhaps in an older version, it is replaced without a gap.
func (c clsact) attach(id string, ifindex int, h hook) error {
	old, err := c.pins(id, h)
	if err != nil {
		return err
	}
	for _, other := range old {
		if other == ifindex && c.verify(id, ifindex, h) == nil {
			return nil
		}
		if other == ifindex {
			continue
		}
		if err := c.drop(id, other, h); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(c.e.linkDir(id), 0o700); err != nil {
		return err
	}
	// The pin first: what has no pin is never removed.
	if err := pinProgram(h.prog, c.pin(id, h, ifindex)); err != nil {
		return err
	}
	qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
	if err := netlink.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("link %d: add clsact qdisc: %w", ifindex, err)
	}
	if err := netlink.FilterReplace(h.filter(ifindex)); err != nil {
		return fmt.Errorf("link %d: set filter: %w", ifindex, err)
	}
	if c.checkFilter(ifindex, h) == nil {
		return nil
	}
	// Another one came before it. What is added goes in front of its priority.
	if err := netlink.FilterDel(h.filter(ifindex)); err != nil {
		return fmt.Errorf("link %d: move filter: %w", ifindex, err)
	}
	if err := netlink.FilterAdd(h.filter(ifindex)); err != nil {
		return fmt.Errorf("link %d: move filter: %w", ifindex, err)
	}
	return nil
}

// pinProgram pins p at path instead of what is there.
func pinProgram(p *ebpf.Program, path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("unpin program: %w", err)
	}
	// A clone: to pin p itself would move its pin.
	clone, err := p.Clone()
	if err != nil {
		return fmt.Errorf("pin program: %w", err)
	}
	defer clone.Close()
	if err := clone.Pin(path); err != nil {
		return fmt.Errorf("pin program: %w", err)
	}
	return nil
}

// verify tells whether the hook's program is the first that runs on the link.
func (c clsact) verify(id string, ifindex int, h hook) error {
	if _, err := os.Stat(c.pin(id, h, ifindex)); err != nil {
		return fmt.Errorf("%w: pin of %s: %w", ErrNotEnforced, h.pin, err)
	}
	return c.checkFilter(ifindex, h)
}

func (c clsact) checkFilter(ifindex int, h hook) error {
	want, err := programID(h.prog)
	if err != nil {
		return err
	}
	filters, err := listFilters(ifindex, h)
	if err != nil {
		return fmt.Errorf("%w: list filters at %s of link %d: %w", ErrNotEnforced, h.pin, ifindex, err)
	}
	if len(filters) == 0 {
		return fmt.Errorf("%w: %s of link %d has no filter", ErrNotEnforced, h.pin, ifindex)
	}
	first, ok := filters[0].(*netlink.BpfFilter)
	if !ok || first.Priority != clsactPriority || first.Handle != clsactHandle {
		return fmt.Errorf("%w: another filter runs before ours at %s of link %d", ErrNotEnforced, h.pin, ifindex)
	}
	if ebpf.ProgramID(first.Id) != want || !first.DirectAction || first.Protocol != unix.ETH_P_ALL {
		return fmt.Errorf("%w: %s of link %d runs program %d, not %d", ErrNotEnforced, h.pin, ifindex, first.Id, want)
	}
	// Kernels that have TCX run it before any filter.
	tcx, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: h.attach})
	if err == nil && len(tcx.Programs) > 0 {
		return fmt.Errorf("%w: a TCX program runs before ours at %s of link %d", ErrNotEnforced, h.pin, ifindex)
	}
	return nil
}

// listFilters answers the filters that packets pass at the hook, in order.
func listFilters(ifindex int, h hook) ([]netlink.Filter, error) {
	l, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return nil, err
	}
	all, err := netlink.FilterList(l, h.parent())
	if err != nil {
		return nil, err
	}
	var chain0 []netlink.Filter
	for _, f := range all {
		if chain := f.Attrs().Chain; chain == nil || *chain == 0 {
			chain0 = append(chain0, f)
		}
	}
	return chain0, nil
}

// detach removes the filters and pins of the sandbox.
func (c clsact) detach(id string) error {
	for _, h := range c.e.hooks() {
		ifindexes, err := c.pins(id, h)
		if err != nil {
			return err
		}
		for _, ifindex := range ifindexes {
			if err := c.drop(id, ifindex, h); err != nil {
				return fmt.Errorf("detach %s: %w", h.pin, err)
			}
		}
	}
	if err := os.Remove(c.e.linkDir(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// drop removes our filter from a link, the qdisc if nobody else uses it, and
// then the pin.
func (c clsact) drop(id string, ifindex int, h hook) error {
	ours, err := c.ours(ifindex, h)
	if err != nil {
		return err
	}
	if ours {
		if err := netlink.FilterDel(h.filter(ifindex)); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("link %d: remove filter: %w", ifindex, err)
		}
		if err := dropQdisc(ifindex, c.e.hooks()); err != nil {
			return err
		}
	}
	if err := os.Remove(c.pin(id, h, ifindex)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("unpin: %w", err)
	}
	return nil
}

// ours tells whether the link has a filter of ours, of whatever version.
func (c clsact) ours(ifindex int, h hook) (bool, error) {
	filters, err := listFilters(ifindex, h)
	if gone := (netlink.LinkNotFoundError{}); errors.As(err, &gone) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) {
		return false, nil // the link is gone, or its qdisc
	}
	if err != nil {
		return false, fmt.Errorf("link %d: list filters: %w", ifindex, err)
	}
	want := h.filter(ifindex)
	for _, f := range filters {
		b, ok := f.(*netlink.BpfFilter)
		if ok && b.Priority == want.Priority && b.Handle == want.Handle && b.Name == want.Name {
			return true, nil
		}
	}
	return false, nil
}

// dropQdisc removes the clsact qdisc of a link that has no filters left.
func dropQdisc(ifindex int, hooks [2]hook) error {
	for _, h := range hooks {
		l, err := netlink.LinkByIndex(ifindex)
		if err != nil {
			return fmt.Errorf("link %d: %w", ifindex, err)
		}
		// Those of all chains.
		filters, err := netlink.FilterList(l, h.parent())
		if err != nil {
			return fmt.Errorf("link %d: list filters: %w", ifindex, err)
		}
		if len(filters) > 0 {
			return nil
		}
	}
	err := netlink.QdiscDel(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}})
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("link %d: remove clsact qdisc: %w", ifindex, err)
	}
	return nil
}

// upgrade puts the program of this version in the place of the pinned one. A
// link that is gone, or has no filter of ours, has nothing to update.
func (c clsact) upgrade(id string, h hook) error {
	ifindexes, err := c.pins(id, h)
	if err != nil {
		return err
	}
	for _, ifindex := range ifindexes {
		ours, err := c.ours(ifindex, h)
		if err != nil {
			return err
		}
		if !ours {
			continue
		}
		if err := netlink.FilterReplace(h.filter(ifindex)); err != nil {
			return fmt.Errorf("link %d: replace filter: %w", ifindex, err)
		}
		if err := pinProgram(h.prog, c.pin(id, h, ifindex)); err != nil {
			return err
		}
	}
	return nil
}
