// SPDX-License-Identifier: Apache-2.0

package link

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// fact is one rule of the table as the kernel describes it.
type fact struct {
	chain, comment string
	exprs          []byte
}

func nftRequest(op string, msg, flags int, attrs ...*nl.RtAttr) *request {
	r := &request{op: op, msg: nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|msg, flags)}
	r.add(&nl.Nfgenmsg{NfgenFamily: unix.NFPROTO_INET})
	for _, a := range attrs {
		r.add(a)
	}
	return r
}

// eachNftAttr walks the attributes of an nftables message.
func eachNftAttr(b []byte, f func(typ uint16, value []byte) error) error {
	if len(b) < nl.SizeofNfgenmsg {
		return errShort
	}
	return eachAttr(b[nl.SizeofNfgenmsg:], func(typ uint16, _, value []byte) error { return f(typ, value) })
}

// generation answers the number of the last change to any rule, set or chain
// of the namespace. Packets do not change it.
func (c *conn) generation() (gen uint32, err error) {
	r := nftRequest("read nftables generation", unix.NFT_MSG_GETGEN, unix.NLM_F_ACK)
	err = c.get(r, func(_ uint16, b []byte) error {
		return eachNftAttr(b, func(typ uint16, value []byte) error {
			if typ == unix.NFTA_GEN_ID && len(value) == 4 {
				gen = binary.BigEndian.Uint32(value)
			}
			return nil
		})
	})
	if err == nil && gen == 0 {
		err = errors.New("read nftables generation: the kernel gave none")
	}
	return gen, err
}

// ruleFacts answers the rules of a table, in order.
func (c *conn) ruleFacts(table string) ([]fact, error) {
	for try := 0; ; try++ {
		var all []fact
		r := nftRequest("list rules of table inet "+table, unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP,
			nl.NewRtAttr(unix.NFTA_RULE_TABLE, nl.ZeroTerminated(table)))
		err := c.get(r, func(_ uint16, b []byte) error {
			f, err := parseRule(b)
			all = append(all, f)
			return err
		})
		if errors.Is(err, errInterrupted) && try < 20 {
			continue
		}
		return all, err
	}
}

func parseRule(b []byte) (fact, error) {
	var f fact
	err := eachNftAttr(b, func(typ uint16, value []byte) error {
		switch typ {
		case unix.NFTA_RULE_CHAIN:
			f.chain = string(bytes.TrimRight(value, "\x00"))
		case unix.NFTA_RULE_EXPRESSIONS:
			f.exprs = bytes.Clone(value)
		case unix.NFTA_RULE_USERDATA:
			f.comment = parseComment(value)
		}
		return nil
	})
	return f, err
}

// parseComment finds the comment in a rule's user data: entries of one byte
// of type, one of length, and the value. Anyone may have written them.
func parseComment(b []byte) string {
	for len(b) >= 2 {
		n := 2 + int(b[1])
		if n > len(b) {
			return ""
		}
		if b[0] == byte(userdata.TypeComment) {
			return string(bytes.TrimRight(b[2:n], "\x00"))
		}
		b = b[n:]
	}
	return ""
}

// object is a named object of a table.
type object struct {
	name string
	data []byte
}

// objects answers the objects of one type of a table. The library reads all
// of a table's objects, and cannot read timeouts from two goroutines: it
// keeps them in a variable of its own (v0.3.0).
func (c *conn) objects(table string, typ uint32) ([]object, error) {
	for try := 0; ; try++ {
		var all []object
		r := nftRequest("list objects of table inet "+table, unix.NFT_MSG_GETOBJ, unix.NLM_F_DUMP,
			nl.NewRtAttr(unix.NFTA_OBJ_TABLE, nl.ZeroTerminated(table)),
			nl.NewRtAttr(unix.NFTA_OBJ_TYPE, binary.BigEndian.AppendUint32(nil, typ)))
		err := c.get(r, func(_ uint16, b []byte) error {
			o, err := parseObject(b)
			all = append(all, o)
			return err
		})
		if errors.Is(err, errInterrupted) && try < 20 {
			continue
		}
		return all, err
	}
}

func parseObject(b []byte) (o object, err error) {
	err = eachNftAttr(b, func(typ uint16, value []byte) error {
		switch typ {
		case unix.NFTA_OBJ_NAME:
			o.name = string(bytes.TrimRight(value, "\x00"))
		case unix.NFTA_OBJ_DATA:
			o.data = bytes.Clone(value)
		}
		return nil
	})
	return o, err
}

func parseCounter(b []byte) (c expr.Counter, err error) {
	err = eachAttr(b, func(typ uint16, _, value []byte) error {
		if typ != unix.NFTA_COUNTER_BYTES && typ != unix.NFTA_COUNTER_PACKETS {
			return nil
		}
		if len(value) != 8 {
			return errShort
		}
		v := binary.BigEndian.Uint64(value)
		if typ == unix.NFTA_COUNTER_BYTES {
			c.Bytes = v
		} else {
			c.Packets = v
		}
		return nil
	})
	return c, err
}

// setElement is what the kernel says of one element of a set.
type setElement struct {
	there   bool
	packets uint64 // of its counter; 0 if it has none
}

// element reads the element of an address.
func (c *conn) element(table, set string, key netip.Addr) (e setElement, err error) {
	elements := nl.NewRtAttr(unix.NFTA_SET_ELEM_LIST_ELEMENTS|unix.NLA_F_NESTED, nil)
	elements.AddRtAttr(unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, nil).
		AddRtAttr(unix.NFTA_SET_ELEM_KEY|unix.NLA_F_NESTED, nil).
		AddRtAttr(unix.NFTA_DATA_VALUE, key.AsSlice())
	r := nftRequest(fmt.Sprintf("read element %s of set %s", key, set), unix.NFT_MSG_GETSETELEM, unix.NLM_F_ACK,
		nl.NewRtAttr(unix.NFTA_SET_ELEM_LIST_TABLE, nl.ZeroTerminated(table)),
		nl.NewRtAttr(unix.NFTA_SET_ELEM_LIST_SET, nl.ZeroTerminated(set)), elements)
	err = c.get(r, func(_ uint16, b []byte) (err error) {
		e.there = true
		e.packets, err = parseElementPackets(b)
		return err
	})
	if errors.Is(err, unix.ENOENT) {
		return setElement{}, nil
	}
	return e, err
}

// within calls f with each attribute of a type, in a nested one.
func within(b []byte, want uint16, f func(value []byte) error) error {
	return eachAttr(b, func(typ uint16, _, value []byte) error {
		if typ != want {
			return nil
		}
		return f(value)
	})
}

// parseElementPackets reads the packets of an element's counter.
func parseElementPackets(b []byte) (packets uint64, err error) {
	if len(b) < nl.SizeofNfgenmsg {
		return 0, errShort
	}
	path := []uint16{
		unix.NFTA_SET_ELEM_LIST_ELEMENTS, unix.NFTA_LIST_ELEM, unix.NFTA_SET_ELEM_EXPR, unix.NFTA_EXPR_DATA, unix.NFTA_COUNTER_PACKETS,
	}
	err = along(b[nl.SizeofNfgenmsg:], path, func(value []byte) error {
		if len(value) != 8 {
			return errShort
		}
		packets = binary.BigEndian.Uint64(value)
		return nil
	})
	return packets, err
}

// along calls f with each attribute at the end of a path of nested ones.
func along(b []byte, path []uint16, f func(value []byte) error) error {
	if len(path) == 0 {
		return f(b)
	}
	return within(b, path[0], func(value []byte) error { return along(value, path[1:], f) })
}
