// SPDX-License-Identifier: Apache-2.0

package link

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// conn is one netlink socket. It stays bound to the network namespace of
// the thread that dialled it, whichever thread uses it.
type conn struct {
	mu  sync.Mutex // one exchange at a time
	fd  int        // +checklocks:mu
	buf []byte     // +checklocks:mu
}

// errInterrupted: the table changed while the kernel listed it.
var errInterrupted = errors.New("listing was interrupted by a change")

func dial() (*conn, error) { return dialProto(unix.NETLINK_ROUTE) }

func dialProto(proto int) (*conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket %d: %w", proto, err)
	}
	// Short answers with a reason in words, and listings that filter in the
	// kernel. Each only helps; old kernels lack some.
	for _, opt := range []int{unix.NETLINK_EXT_ACK, unix.NETLINK_CAP_ACK, unix.NETLINK_GET_STRICT_CHK} {
		_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, opt, 1)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, errors.Join(fmt.Errorf("bind netlink socket %d: %w", proto, err), unix.Close(fd))
	}
	return &conn{fd: fd, buf: make([]byte, 64<<10)}, nil
}

func (c *conn) close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 {
		return nil
	}
	fd := c.fd
	c.fd = -1
	return unix.Close(fd)
}

// request is one message and the errors that mean "already so".
type request struct {
	op   string
	msg  *nl.NetlinkRequest
	fine []unix.Errno
}

func newRequest(op string, typ, flags int, fine ...unix.Errno) *request {
	return &request{op: op, msg: nl.NewNetlinkRequest(typ, flags|unix.NLM_F_ACK), fine: fine}
}

func (r *request) add(d ...nl.NetlinkRequestData) *request {
	for _, x := range d {
		r.msg.AddData(x)
	}
	return r
}

// do sends the requests in one system call and reads their answers. The
// kernel goes on after a request that failed; do answers the first error.
func (c *conn) do(reqs ...*request) error {
	var out []byte
	waiting := make(map[uint32]*request, len(reqs))
	for _, r := range reqs {
		out = append(out, r.msg.Serialize()...)
		for len(out)%unix.NLMSG_ALIGNTO != 0 {
			out = append(out, 0)
		}
		waiting[r.msg.Seq] = r
	}
	errs := make(map[uint32]error)
	err := c.exchange(out, func(h unix.NlMsghdr, body []byte) (bool, error) {
		r := waiting[h.Seq]
		if r == nil || h.Type != unix.NLMSG_ERROR {
			return false, nil
		}
		delete(waiting, h.Seq)
		if e := ackError(body, h.Flags); e != nil && !matches(e, r.fine) {
			errs[h.Seq] = fmt.Errorf("%s: %w", r.op, e)
		}
		return len(waiting) == 0, nil
	})
	if err != nil {
		return fmt.Errorf("%s: %w", reqs[0].op, err)
	}
	if len(errs) == 0 {
		return nil
	}
	for _, r := range reqs {
		if e := errs[r.msg.Seq]; e != nil {
			return e
		}
	}
	return nil
}

// get sends one request and gives every answer to f.
func (c *conn) get(r *request, f func(typ uint16, body []byte) error) error {
	interrupted := false
	err := c.exchange(r.msg.Serialize(), func(h unix.NlMsghdr, body []byte) (bool, error) {
		if h.Seq != r.msg.Seq {
			return false, nil
		}
		interrupted = interrupted || h.Flags&unix.NLM_F_DUMP_INTR != 0
		switch h.Type {
		case unix.NLMSG_DONE:
			if len(body) >= 4 {
				if n := int32(binary.NativeEndian.Uint32(body)); n < 0 {
					return true, unix.Errno(-n)
				}
			}
			return true, nil
		case unix.NLMSG_ERROR:
			return true, ackError(body, h.Flags)
		}
		return false, f(h.Type, body)
	})
	if err == nil && interrupted {
		err = errInterrupted
	}
	if err != nil {
		return fmt.Errorf("%s: %w", r.op, err)
	}
	return nil
}

// exchange sends out and gives each answer to f until f says done.
func (c *conn) exchange(out []byte, f func(unix.NlMsghdr, []byte) (bool, error)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 {
		return net.ErrClosed
	}
	if err := unix.Sendto(c.fd, out, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	for {
		n, _, err := unix.Recvfrom(c.fd, c.buf, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		}
		done, err := eachMessage(c.buf[:n], f)
		if err != nil || done {
			return err
		}
	}
}

func eachMessage(b []byte, f func(unix.NlMsghdr, []byte) (bool, error)) (bool, error) {
	for len(b) >= unix.SizeofNlMsghdr {
		h := unix.NlMsghdr{
			Len:   binary.NativeEndian.Uint32(b[0:]),
			Type:  binary.NativeEndian.Uint16(b[4:]),
			Flags: binary.NativeEndian.Uint16(b[6:]),
			Seq:   binary.NativeEndian.Uint32(b[8:]),
			Pid:   binary.NativeEndian.Uint32(b[12:]),
		}
		if h.Len < unix.SizeofNlMsghdr || int(h.Len) > len(b) {
			return false, errShort
		}
		done, err := f(h, b[unix.SizeofNlMsghdr:h.Len])
		if err != nil || done {
			return done, err
		}
		b = b[min(len(b), (int(h.Len)+3)&^3):]
	}
	return false, nil
}

// ackError answers the error of an acknowledgement, nil if there is none.
func ackError(body []byte, flags uint16) error {
	if len(body) < 4+unix.SizeofNlMsghdr {
		return errShort
	}
	n := int32(binary.NativeEndian.Uint32(body))
	if n == 0 {
		return nil
	}
	errno := unix.Errno(-n)
	if flags&unix.NLM_F_ACK_TLVS == 0 {
		return errno
	}
	rest := body[4:]
	skip := unix.SizeofNlMsghdr
	if flags&unix.NLM_F_CAPPED == 0 {
		skip = (int(binary.NativeEndian.Uint32(rest)) + 3) &^ 3
	}
	if skip > len(rest) {
		return errno
	}
	err := error(errno)
	_ = eachAttr(rest[skip:], func(typ uint16, _, value []byte) error { // the number is what counts
		if typ == unix.NLMSGERR_ATTR_MSG {
			err = fmt.Errorf("%w (%s)", errno, bytes.TrimRight(value, "\x00"))
		}
		return nil
	})
	return err
}

func matches(err error, fine []unix.Errno) bool {
	for _, e := range fine {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// linkInfo is what this package reads of a link.
type linkInfo struct {
	index, peer int // peer: the other end's index, in its own namespace
	name, alias string
	up          bool
	flags       uint32
	oper        uint8
	mac         net.HardwareAddr
	mtu         int
	conf4       []byte // sysctls by id, 32 bits each, from id 1
	conf6       []byte // the same, from id 0
}

// sysctl answers the value of s, -1 if the kernel did not tell it.
func (l linkInfo) sysctl(s linkSysctl) int {
	conf, at := l.conf6, s.id*4
	if s.fam == unix.AF_INET {
		conf, at = l.conf4, (s.id-1)*4
	}
	if at+4 > len(conf) {
		return -1
	}
	return int(int32(binary.NativeEndian.Uint32(conf[at:])))
}

const (
	operUp    = 6      // IF_OPER_UP
	skipStats = 1 << 3 // RTEXT_FILTER_SKIP_STATS
)

func parseLink(b []byte) (linkInfo, error) {
	if len(b) < unix.SizeofIfInfomsg {
		return linkInfo{}, errShort
	}
	msg := nl.DeserializeIfInfomsg(b)
	l := linkInfo{index: int(msg.Index), up: msg.Flags&unix.IFF_UP != 0, flags: msg.Flags}
	err := eachAttr(b[unix.SizeofIfInfomsg:], func(typ uint16, _, value []byte) (err error) {
		switch typ {
		case unix.IFLA_IFNAME:
			l.name = string(bytes.TrimRight(value, "\x00"))
		case unix.IFLA_IFALIAS:
			l.alias = string(bytes.TrimRight(value, "\x00"))
		case unix.IFLA_OPERSTATE:
			if len(value) != 1 {
				return errShort
			}
			l.oper = value[0]
		case unix.IFLA_LINK:
			l.peer, err = attrInt(value)
		case unix.IFLA_ADDRESS:
			l.mac = bytes.Clone(value)
		case unix.IFLA_MTU:
			l.mtu, err = attrInt(value)
		case unix.IFLA_AF_SPEC:
			l.conf4, l.conf6, err = parseLinkSysctls(value)
		}
		return err
	})
	return l, err
}

func parseLinkSysctls(b []byte) (conf4, conf6 []byte, err error) {
	err = eachAttr(b, func(fam uint16, _, value []byte) error {
		return eachAttr(value, func(typ uint16, _, value []byte) error {
			switch {
			case fam == unix.AF_INET && typ == unix.IFLA_INET_CONF:
				conf4 = bytes.Clone(value)
			case fam == unix.AF_INET6 && typ == unix.IFLA_INET6_CONF:
				conf6 = bytes.Clone(value)
			}
			return nil
		})
	})
	return conf4, conf6, err
}

// errShort: the kernel's message ends before it should.
var errShort = errors.New("netlink message is cut off")

// attrInt reads a 32-bit number in host byte order.
func attrInt(b []byte) (int, error) {
	if len(b) != 4 {
		return 0, errShort
	}
	return int(binary.NativeEndian.Uint32(b)), nil
}

// attrTypeMask takes off the flags of an attribute's type (NLA_TYPE_MASK).
const attrTypeMask = 0x3fff

// eachAttr walks netlink attributes: whole is one with header and padding.
func eachAttr(b []byte, f func(typ uint16, whole, value []byte) error) error {
	for len(b) >= unix.SizeofNlAttr {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofNlAttr || n > len(b) {
			return errShort
		}
		next := min(len(b), (n+3)&^3)
		typ := binary.NativeEndian.Uint16(b[2:]) & attrTypeMask
		if err := f(typ, b[:next], b[unix.SizeofNlAttr:n]); err != nil {
			return err
		}
		b = b[next:]
	}
	return nil
}

func nameAttr(name string) *nl.RtAttr { return nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)) }

// link answers the link of a name, ErrNotFound if there is none.
func (c *conn) link(name string) (linkInfo, error) {
	r := &request{op: "read link " + name, msg: nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_ACK)}
	r.add(nl.NewIfInfomsg(unix.AF_UNSPEC), nameAttr(name),
		nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(skipStats)))
	var l linkInfo
	err := c.get(r, func(_ uint16, b []byte) (err error) {
		l, err = parseLink(b)
		return err
	})
	if errors.Is(err, unix.ENODEV) {
		return l, fmt.Errorf("read link %s: %w", name, ErrNotFound)
	}
	return l, err
}

// list answers every link of the namespace.
func (c *conn) list() ([]linkInfo, error) {
	for try := 0; ; try++ {
		r := &request{op: "list links", msg: nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP)}
		r.add(nl.NewIfInfomsg(unix.AF_UNSPEC),
			nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(skipStats)))
		var all []linkInfo
		err := c.get(r, func(_ uint16, b []byte) error {
			l, err := parseLink(b)
			all = append(all, l)
			return err
		})
		if errors.Is(err, errInterrupted) && try < 20 {
			continue
		}
		return all, err
	}
}

// family answers the address family of a.
func family(a netip.Addr) uint8 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// addAddr asks for a on a link, as the only address of its subnet.
func addAddr(index int, a netip.Addr) *request {
	ip := a.AsSlice()
	msg := nl.NewIfAddrmsg(int(family(a)))
	msg.Index = uint32(index)
	msg.Prefixlen = uint8(a.BitLen())
	msg.IfAddrmsg.Flags = unix.IFA_F_PERMANENT
	r := newRequest("add address "+a.String(), unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, unix.EEXIST)
	r.add(msg, nl.NewRtAttr(unix.IFA_LOCAL, ip), nl.NewRtAttr(unix.IFA_ADDRESS, ip))
	if a.Is6() {
		r.add(nl.NewRtAttr(unix.IFA_FLAGS, nl.Uint32Attr(unix.IFA_F_NODAD|unix.IFA_F_PERMANENT)))
	}
	return r
}

// addNeigh asks for a permanent neighbour.
func addNeigh(index int, a netip.Addr, mac net.HardwareAddr) *request {
	return newRequest("add neighbour "+a.String(), unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE).add(
		&ndmsg{family: family(a), index: uint32(index), state: unix.NUD_PERMANENT},
		nl.NewRtAttr(unix.NDA_DST, a.AsSlice()),
		nl.NewRtAttr(unix.NDA_LLADDR, mac))
}

// addHostRoute asks for a route to one address through a link.
func addHostRoute(index int, a netip.Addr) *request {
	msg := nl.NewRtMsg()
	msg.Family = family(a)
	msg.Dst_len = uint8(a.BitLen())
	msg.Scope = unix.RT_SCOPE_LINK
	return newRequest("add route to "+a.String(), unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE).add(
		msg, nl.NewRtAttr(unix.RTA_DST, a.AsSlice()), nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(uint32(index))))
}

// addDefaultRoute asks for the default route through a gateway that no
// subnet of the link holds.
func addDefaultRoute(index int, gw, src netip.Addr) *request {
	msg := nl.NewRtMsg()
	msg.Family = family(gw)
	msg.Flags = unix.RTNH_F_ONLINK
	return newRequest("add default route via "+gw.String(), unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE).add(
		msg, nl.NewRtAttr(unix.RTA_GATEWAY, gw.AsSlice()), nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(uint32(index))),
		nl.NewRtAttr(unix.RTA_PREFSRC, src.AsSlice()))
}

// ndmsg is struct ndmsg of linux/neighbour.h.
type ndmsg struct {
	family uint8
	index  uint32
	state  uint16
}

func (n *ndmsg) Len() int { return unix.SizeofNdMsg }

func (n *ndmsg) Serialize() []byte {
	b := make([]byte, unix.SizeofNdMsg)
	b[0] = n.family
	binary.NativeEndian.PutUint32(b[4:], n.index)
	binary.NativeEndian.PutUint16(b[8:], n.state)
	return b
}
