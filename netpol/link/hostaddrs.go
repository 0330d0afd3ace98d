// SPDX-License-Identifier: Apache-2.0

package link

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// localTable is the routing table in which the kernel keeps what it takes
// for itself.
const localTable = 255

// HostAddrs answers, sorted, every destination that the kernel would take for
// the host itself, loopback and broadcast included: what no sandbox may
// reach. It reads the local routing table, so it also knows prefixes that are
// local without being the address of a link. Sandbox links have no address of
// their own; local routes on them are left out all the same.
func HostAddrs() ([]netip.Prefix, error) {
	c, err := dial()
	if err != nil {
		return nil, err
	}
	addrs, err := c.localPrefixes()
	return addrs, errors.Join(err, c.close())
}

// localPrefixes reads until the kernel gave one undisturbed listing.
func (c *conn) localPrefixes() ([]netip.Prefix, error) {
	for try := 0; ; try++ {
		addrs, err := c.readLocal()
		if errors.Is(err, errInterrupted) && try < 20 {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list host addresses: %w", err)
		}
		return addrs, nil
	}
}

func (c *conn) readLocal() ([]netip.Prefix, error) {
	links, err := c.list()
	if err != nil {
		return nil, err
	}
	ours := map[int]bool{}
	for _, l := range links {
		if strings.HasPrefix(l.alias, aliasWord+" ") {
			ours[l.index] = true
		}
	}
	var found []netip.Prefix
	for _, fam := range []uint8{unix.AF_INET, unix.AF_INET6} {
		msg := nl.NewRtMsg()
		msg.Family, msg.Table, msg.Protocol, msg.Scope, msg.Type = fam, localTable, 0, 0, 0
		r := &request{op: "list local routes", msg: nl.NewNetlinkRequest(unix.RTM_GETROUTE, unix.NLM_F_DUMP)}
		r.add(msg, nl.NewRtAttr(unix.RTA_TABLE, nl.Uint32Attr(localTable)))
		err := c.get(r, func(_ uint16, b []byte) error {
			p, oif, ok, err := parseLocal(b)
			if err == nil && ok && !ours[oif] {
				found = append(found, p)
			}
			return err
		})
		if err != nil && !errors.Is(err, unix.ENOENT) { // a family without the table
			return nil, err
		}
	}
	slices.SortFunc(found, netip.Prefix.Compare)
	return slices.Compact(found), nil
}

// parseLocal reads a route; ok only if what it leads to is the host.
func parseLocal(b []byte) (p netip.Prefix, oif int, ok bool, err error) {
	if len(b) < unix.SizeofRtMsg {
		return p, 0, false, errShort
	}
	msg := nl.DeserializeRtMsg(b)
	switch msg.Type {
	case unix.RTN_LOCAL, unix.RTN_BROADCAST, unix.RTN_ANYCAST:
	default:
		return p, 0, false, nil
	}
	table := int(msg.Table)
	var dst netip.Addr
	err = eachAttr(b[unix.SizeofRtMsg:], func(typ uint16, _, value []byte) (err error) {
		switch typ {
		case unix.RTA_DST:
			dst, _ = netip.AddrFromSlice(value)
		case unix.RTA_OIF:
			oif, err = attrInt(value)
		case unix.RTA_TABLE:
			table, err = attrInt(value)
		}
		return err
	})
	if err != nil {
		return p, oif, false, err
	}
	if table != localTable || !dst.IsValid() {
		return p, oif, false, nil
	}
	return netip.PrefixFrom(dst, int(msg.Dst_len)), oif, true, nil
}

// WatchHostAddrs calls f with the answer of HostAddrs, and again each time
// that it has changed, until ctx ends, which is not an error. f runs on the
// caller's goroutine.
func WatchHostAddrs(ctx context.Context, f func([]netip.Prefix)) error {
	events, err := subscribe(unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		return err
	}
	defer events.Close()
	stop := context.AfterFunc(ctx, func() { _ = events.Close() }) // ends the read below
	defer stop()

	c, err := dial()
	if err != nil {
		return err
	}
	defer c.close() //nolint:errcheck // nothing was written

	last, err := c.localPrefixes()
	if err != nil {
		return err
	}
	f(last)
	for {
		if err := waitLocalChange(events); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("watch host addresses: %w", err)
		}
		now, err := c.localPrefixes()
		if err != nil {
			return err
		}
		if !slices.Equal(now, last) {
			last = now
			f(now)
		}
	}
}

// subscribe opens an rtnetlink socket that the Go poller can wait on.
func subscribe(groups ...int) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open rtnetlink: %w", err)
	}
	file := os.NewFile(uintptr(fd), "rtnetlink")
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, errors.Join(fmt.Errorf("bind rtnetlink: %w", err), file.Close())
	}
	for _, g := range groups {
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, g); err != nil {
			return nil, errors.Join(fmt.Errorf("join rtnetlink group %d: %w", g, err), file.Close())
		}
	}
	return file, nil
}

// waitLocalChange returns when a message may mean that a local destination
// came or went. The routes of sandboxes come and go all the time and are
// passed over.
func waitLocalChange(events *os.File) error {
	buf := make([]byte, 64<<10)
	for {
		n, err := events.Read(buf)
		if errors.Is(err, unix.ENOBUFS) {
			return nil // messages were lost: look
		}
		if err != nil {
			return err
		}
		if mayBeLocal(buf[:n]) {
			return nil
		}
	}
}

// mayBeLocal reports whether messages are about a local destination. What
// cannot be read may be.
func mayBeLocal(b []byte) bool {
	local, err := eachMessage(b, func(h unix.NlMsghdr, body []byte) (bool, error) {
		switch h.Type {
		case unix.RTM_NEWADDR, unix.RTM_DELADDR:
			return true, nil
		case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
			_, _, ok, err := parseLocal(body)
			return ok, err
		}
		return false, nil
	})
	return local || err != nil
}
