// SPDX-License-Identifier: Apache-2.0

package threats

import (
	"net/netip"
	"testing"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// What is not there matches nothing: a list that is empty, a key that is
// missing, an exception that takes all away.
func TestEmptyRule(t *testing.T) {
	n := theWorld(t)
	for name, rules := range map[string]string{
		"no targets":   "- {name: x, action: allow, to: [], ports: [any/tcp]}\n",
		"no to":        "- {name: x, action: allow, ports: [any/tcp]}\n",
		"empty target": "- {name: x, action: allow, to: [{}], ports: [any/tcp]}\n",
		"empty cidr":   "- {name: x, action: allow, to: [{cidr: ''}], ports: [any/tcp]}\n",
		"no ports":     "- {name: x, action: allow, to: [{cidr: 0.0.0.0/0}]}\n",
		"empty ports":  "- {name: x, action: allow, to: [{cidr: 0.0.0.0/0}], ports: []}\n",
		"no action":    "- {name: x, to: [{cidr: 0.0.0.0/0}], ports: [any/tcp]}\n",
		"mistyped key": "- {name: x, action: allow, to: [{cidr: 0.0.0.0/0, excpet: [10.0.0.0/8]}], ports: [any/tcp]}\n",
		"null action":  "- {name: x, action: , to: [{cidr: 0.0.0.0/0}], ports: [any/tcp]}\n",
	} {
		if _, err := netpol.Parse("x.yaml", []byte("kind: EgressPolicy\nname: x\nrules:\n"+rules)); err == nil {
			t.Errorf("%s: the policy was accepted", name)
		}
	}
	b := n.sandbox(t, "- {name: hole, action: allow, to: [{cidr: 203.0.113.0/24, except: [203.0.113.0/25]}], ports: [any/udp, any/tcp]}\n")
	bad := func(reason string) []attack {
		return []attack{
			{"UDP", reason, one(packet{dst: other4, port: 7777}), false},
			{"SYN", reason, one(packet{dst: other6, syn: true}), false},
		}
	}
	b.repel(t, bad("no_rule")...)
	// No layer at all, and the zero program.
	none, err := netpol.Compile(nil)
	must(t, err)
	for _, p := range []netpol.Program{none, {}} {
		empty := n.sandbox(t, "")
		k := newToken()
		n.await(k)
		empty.setPolicy(t, p, 2)
		before := empty.drops(t)
		empty.send(t, bad("no_rule")[0].frames(empty, k)...)
		if empty.dropped(t, "no_rule", before, 1) != 1 || n.waitFor(k, 1, settle) != 0 {
			t.Errorf("an empty program does not deny: %v", empty.drops(t))
		}
		n.forget(k)
	}
}

// A deny rule wins whatever the lengths of the prefixes, and whoever wrote it.
func TestBroadDenyNarrowAllow(t *testing.T) {
	n := theWorld(t)
	narrow := "- {name: narrow, action: allow, to: [{cidr: 203.0.113.7/32}, {cidr: '2001:db8:1::7/128'}], ports: [any/udp]}\n"
	broad := "- {name: broad, action: deny, to: [{cidr: 203.0.0.0/16}, {cidr: '2001:db8:1::/48'}]}\n"
	layers := func(list ...string) netpol.Program {
		var chain []netpol.Layer
		for i, rules := range list {
			chain = append(chain, netpol.Layer{Tenant: []string{"acme", "acme/vision"}[i], Policy: parse(t, rules)})
		}
		p, err := netpol.Compile(chain)
		must(t, err)
		return p
	}
	arrives(t, n, n.launch(t, layers(narrow)), packet{dst: other4, port: 7777})
	for name, p := range map[string]netpol.Program{
		"deny after allow":         layers(narrow + broad),
		"deny before allow":        layers(broad + narrow),
		"the ancestor denies":      layers(broad, narrow),
		"the descendant denies":    layers(narrow, broad),
		"allowed twice, once deny": layers(narrow+openRule, broad),
	} {
		t.Run(name, func(t *testing.T) {
			n.launch(t, p).repel(t,
				attack{"IPv4", "rule_deny", one(packet{dst: other4, port: 7777}), false},
				attack{"IPv6", "rule_deny", one(packet{dst: other6, port: 7777}), false},
			)
		})
	}
}

// arrives is the control of a policy that allows the packet.
func arrives(t *testing.T, n *node, b *box, p packet) {
	t.Helper()
	k := newToken()
	n.await(k)
	defer n.forget(k)
	b.send(t, one(p)(b, k)...)
	if n.waitFor(k, 1, patience) == 0 {
		t.Errorf("control: %s to %s does not arrive under a policy that allows it; drops %v", b, p.dst, b.drops(t))
	}
}

// There is no check above L4 that a broader rule could take away. What there
// is holds: a range of ports does not hide a denied one inside it.
func TestBroadAllowHidesNoDeny(t *testing.T) {
	n := theWorld(t)
	wide := "- {name: wide, action: allow, to: [{cidr: 0.0.0.0/0}], ports: [1-65535/tcp, 1-65535/udp]}\n"
	arrives(t, n, n.sandbox(t, wide), packet{dst: other4, port: 25})
	b := n.sandbox(t, wide+"- {name: nomail, action: deny, to: [{cidr: 203.0.113.0/24}], ports: [25/tcp, 25/udp]}\n")
	b.repel(t,
		attack{"UDP", "rule_deny", one(packet{dst: other4, port: 25}), false},
		attack{"SYN", "rule_deny", one(packet{dst: other4, port: 25, syn: true}), false},
	)
	arrives(t, n, b, packet{dst: other4, port: 26})
}

// Nothing looks into TLS: what a client says is no reason to let it pass, and
// none to stop it. The address decides.
func TestServerNameDecidesNothing(t *testing.T) {
	n := theWorld(t)
	b := n.sandbox(t, "- {name: web, action: allow, to: [{cidr: 203.0.113.8/32}], ports: [443/tcp]}\n")
	hello := func(dst netip.Addr, name string) packet {
		sni := append([]byte{0, 0, 0, byte(len(name) + 5), 0, byte(len(name) + 3), 0, 0, byte(len(name))}, name...)
		body := append([]byte{1, 0, 0, byte(len(sni) + 43), 3, 3}, make([]byte, 32)...)
		body = append(append(body, 0, 0, 2, 0x13, 1, 1, 0, 0, byte(len(sni))), sni...)
		return packet{dst: dst, flags: 0x18, port: 443, payload: append([]byte{0x16, 3, 1, 0, byte(len(body))}, body...)}
	}
	b.repel(t,
		attack{"an allowed name at another address", "no_rule", one(hello(other4, "good.example")), false},
		attack{"no name at another address", "no_rule", one(hello(other4, "")), false},
	)
	// The gap, documented: the name of another server at the allowed address.
	for _, name := range []string{"good.example", "evil.example", ""} {
		arrives(t, n, b, hello(netip.MustParseAddr("203.0.113.8"), name))
	}
}
