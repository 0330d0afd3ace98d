// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Compile folds a chain of layers, ancestors first, into one Program.
//
// It refuses layers that Parse would not have made, an allow rule of which
// some target or port lies wholly outside an ancestor's guardrail, a prefix
// whose decision takes more than MaxPortRules steps, and more than MaxLevels
// rates or budgets. What lies partly outside a guardrail is cut down to it.
// Errors are *Error, joined if there are several.
func Compile(layers []Layer) (Program, error) {
	c := compiler{layers: layers, auditFrom: auditFrom(layers)}
	c.number()
	c.limits()
	if len(c.errs) == 0 {
		c.checkGuardrails()
	}
	if err := joinErrors(c.errs); err != nil {
		return Program{}, err
	}
	c.names()
	c.index()
	c.walk()
	if err := joinErrors(c.errs); err != nil {
		return Program{}, err
	}
	c.prog.Digest = c.prog.digest()
	return c.prog, nil
}

// compiler turns layers into entries.
//
// All prefixes that a chain mentions, exceptions included, are either nested
// or disjoint. So for an address whose longest such prefix is p, a mentioned
// prefix contains the address exactly if it contains p: one decision holds
// for all of p's own addresses, and a walk down the sorted prefixes with a
// stack sees for each p exactly the prefixes that matter.
type compiler struct {
	layers    []Layer
	auditFrom int // first layer of those at the end that only watch
	errs      []*Error
	prog      Program

	rules  []flatRule // by rule ID
	bounds []flatBound
	// byPrefix: what begins and what ends at a prefix.
	byPrefix map[netip.Prefix]*marks
	prefixes []netip.Prefix        // keys of byPrefix, sorted
	decided  map[string][]PortRule // by what is active
}

type flatRule struct {
	id     uint16
	layer  int
	rule   Rule
	ports  []PortRange // merged
	active int         // targets that match at the current prefix
}

type flatBound struct {
	layer  int
	ports  []PortRange // merged
	active int
}

// claim is one target of one rule or bound.
type claim struct {
	holds  bool // matches at the current prefix
	active *int // counter of its rule or bound
}

type marks struct{ begin, end []*claim }

func (c *compiler) add(l Layer, line int, format string, args ...any) {
	c.errs = append(c.errs, &Error{File: l.file(), Line: line, Msg: fmt.Sprintf(format, args...)})
}

// number checks the layers and gives every rule its ID.
func (c *compiler) number() {
	type name struct{ tenant, rule string }
	seen := map[name]string{}
	targets := 0
	for i, l := range c.layers {
		c.checkLayer(l)
		for _, r := range l.Policy.Rules {
			key := name{l.Tenant, r.Name}
			if where, dup := seen[key]; dup {
				c.add(l, r.Line, "rule %q of %s is already defined in %s: choose another name", r.Name, l.Tenant, where)
				continue
			}
			seen[key] = place(l, r.Line)
			ports := r.Ports
			if len(ports) == 0 && r.Action == Deny {
				ports = everyPort()
			}
			c.rules = append(c.rules, flatRule{id: uint16(len(c.rules)), layer: i, rule: r, ports: mergePorts(ports)})
			targets += countTargets(r.To)
		}
		if g := l.Policy.Guardrail; g != nil {
			for _, b := range g.Bounds {
				c.bounds = append(c.bounds, flatBound{layer: i, ports: mergePorts(b.Ports)})
				targets += countTargets(b.To)
			}
		}
	}
	if len(c.errs) > 0 || len(c.layers) == 0 {
		return
	}
	last := c.layers[len(c.layers)-1]
	if len(c.rules) > MaxRules {
		c.add(last, 0, "%s has %d rules together with its ancestors, at most %d are allowed", last.Tenant, len(c.rules), MaxRules)
	}
	if rated := slices.DeleteFunc(slices.Clone(c.rules), func(r flatRule) bool { return r.rule.Rate == 0 }); len(rated) > MaxRated {
		over := rated[MaxRated]
		c.add(c.layers[over.layer], over.rule.Line, "%s has %d rules with a rate together with its ancestors, at most %d are allowed: give them one policy rate, or fewer rules",
			last.Tenant, len(rated), MaxRated)
	}
	if targets > MaxTargets {
		c.add(last, 0, "%s has %d targets and exceptions together with its ancestors, at most %d are allowed", last.Tenant, targets, MaxTargets)
	}
	for i, r := range c.rules {
		c.prog.Rules = append(c.prog.Rules, RuleRef{
			ID: uint16(i), Tenant: c.layers[r.layer].Tenant, Name: r.rule.Name, Action: r.rule.Action, Rate: r.rule.Rate,
		})
	}
}

// place names a line of a layer's file for the middle of a message.
func place(l Layer, line int) string {
	switch {
	case l.file() == "":
		return "the policy of " + l.Tenant
	case line == 0:
		return l.file()
	}
	return fmt.Sprintf("%s:%d", l.file(), line)
}

func countTargets(to []Target) int {
	n := len(to)
	for _, t := range to {
		n += len(t.Except)
	}
	return n
}

func joinPorts(ports []PortRange) string {
	if len(subtractPorts([]PortRange{echoPort, {1, 65535, TCP}, {1, 65535, UDP}}, mergePorts(ports))) == 0 {
		return "all"
	}
	s := make([]string, len(ports))
	for i, p := range ports {
		s[i] = p.String()
	}
	return strings.Join(s, " ")
}

// index sorts the prefixes and notes what begins and ends at each.
func (c *compiler) index() {
	c.byPrefix = map[netip.Prefix]*marks{}
	at := func(p netip.Prefix) *marks {
		m := c.byPrefix[p]
		if m == nil {
			m = &marks{}
			c.byPrefix[p] = m
			c.prefixes = append(c.prefixes, p)
		}
		return m
	}
	enter := func(to []Target, active *int) {
		for _, t := range to {
			if t.FQDN != "" {
				continue // see Program.Learn
			}
			cl := &claim{active: active}
			m := at(t.CIDR)
			m.begin = append(m.begin, cl)
			for _, e := range t.Except {
				m := at(e)
				m.end = append(m.end, cl)
			}
		}
	}
	for i := range c.rules {
		enter(c.rules[i].rule.To, &c.rules[i].active)
	}
	i := 0
	for _, l := range c.layers {
		if l.Policy.Guardrail == nil {
			continue
		}
		for _, b := range l.Policy.Guardrail.Bounds {
			enter(b.To, &c.bounds[i].active)
			i++
		}
	}
	if c.auditFrom < len(c.layers) {
		for _, all := range []string{"0.0.0.0/0", "::/0"} {
			at(netip.MustParsePrefix(all))
		}
	}
	slices.SortFunc(c.prefixes, netip.Prefix.Compare)
}

// frame is one prefix on the walk's stack.
type frame struct {
	prefix netip.Prefix
	ports  []PortRule
	begun  []*claim
	ended  []*claim
}

// walk visits the prefixes in order, each after all that contain it, and
// makes an entry wherever the decision differs from the one around it.
func (c *compiler) walk() {
	var stack []frame
	c.decided = map[string][]PortRule{}
	for _, p := range c.prefixes {
		for len(stack) > 0 && !covers(stack[len(stack)-1].prefix, p) {
			stack[len(stack)-1].leave()
			stack = stack[:len(stack)-1]
		}
		f := frame{prefix: p}
		f.enter(c.byPrefix[p])
		f.ports = c.decideOnce(p)
		var around []PortRule
		if len(stack) > 0 {
			around = stack[len(stack)-1].ports
		}
		if !slices.Equal(f.ports, around) {
			c.prog.Entries = append(c.prog.Entries, Entry{Prefix: p, Ports: f.ports})
		}
		stack = append(stack, f)
	}
}

func (f *frame) enter(m *marks) {
	for _, cl := range m.begin {
		cl.holds = true
		*cl.active++
		f.begun = append(f.begun, cl)
	}
	for _, cl := range m.end {
		if cl.holds { // not if a wider exception has ended it already
			cl.holds = false
			*cl.active--
			f.ended = append(f.ended, cl)
		}
	}
}

func (f *frame) leave() {
	for _, cl := range f.ended {
		cl.holds = true
		*cl.active++
	}
	for _, cl := range f.begun {
		cl.holds = false
		*cl.active--
	}
}

// decideOnce is decide, remembered: it depends on nothing but the rules and
// bounds that are active, and thousands of prefixes may have the same.
func (c *compiler) decideOnce(p netip.Prefix) []PortRule {
	var key []byte
	for i := range c.rules {
		if c.rules[i].active > 0 {
			key = binary.AppendUvarint(key, uint64(i))
		}
	}
	for i := range c.bounds {
		if c.bounds[i].active > 0 {
			key = binary.AppendUvarint(key, uint64(len(c.rules)+i))
		}
	}
	ports, ok := c.decided[string(key)]
	if !ok {
		ports = c.decide(p)
		c.decided[string(key)] = ports
	}
	return ports
}

// decide answers the steps for addresses whose longest prefix is p, from the
// rules and bounds that are active now: denies first, then what is only
// recorded as one, allows, and what passes for audit alone; without the steps
// that an earlier one hides.
func (c *compiler) decide(p netip.Prefix) []PortRule {
	s := steps{}
	rails := c.rails()
	var denied, allowed []flatRule
	for _, r := range c.rules {
		switch {
		case r.active == 0:
		case r.rule.Action == Deny:
			denied = append(denied, r)
		default:
			r.ports = r.within(rails)
			allowed = append(allowed, r)
		}
	}
	open := c.open(rails, allowed)
	for _, r := range denied {
		s.add(PortRule{Deny: true, Rule: r.id}, subtractPorts(r.ports, c.watched(r, open)))
	}
	for _, r := range denied {
		s.add(PortRule{Deny: true, Audit: true, Rule: r.id}, intersectPorts(r.ports, c.watched(r, open)))
	}
	for _, r := range allowed {
		s.add(PortRule{Rule: r.id}, r.ports)
	}
	s.add(PortRule{Audit: true, Rule: NoRule}, c.audited(rails))
	if len(s.steps) > MaxPortRules {
		c.tooMany(p, s.steps)
		return nil
	}
	return s.steps
}

// audited answers the ports that pass for audit at the current prefix.
func (c *compiler) audited(rails []flatBound) []PortRange {
	if c.auditFrom == len(c.layers) {
		return nil
	}
	ports := everyPort()
	for _, rail := range rails {
		if rail.layer < c.auditFrom {
			ports = intersectPorts(ports, rail.ports)
		}
	}
	return ports
}

// open answers the ports at which a deny rule of a layer that only watches
// lets pass.
func (c *compiler) open(rails []flatBound, allowed []flatRule) []PortRange {
	if c.auditFrom == len(c.layers) {
		return nil
	}
	ports := c.audited(rails)
	for _, r := range allowed {
		ports = append(ports, r.ports...)
	}
	return mergePorts(ports)
}

// watched answers the part of open that holds for a deny rule.
func (c *compiler) watched(r flatRule, open []PortRange) []PortRange {
	if r.layer < c.auditFrom {
		return nil
	}
	return open
}

// steps are put together in the order in which they are tried.
type steps struct {
	steps  []PortRule
	hidden []PortRange // merged ports of steps
}

// add appends a step like s for each of ports, but for those that never
// would be reached.
func (s *steps) add(step PortRule, ports []PortRange) {
	for _, r := range ports {
		if portsCover(s.hidden, r) {
			continue
		}
		step.Lo, step.Hi, step.Proto = r.Lo, r.Hi, r.Proto
		s.steps = append(s.steps, step)
		s.hidden = mergePorts(append(s.hidden, r))
	}
}

// within answers the ports of an allow rule that the guardrails before it
// leave.
func (r flatRule) within(rails []flatBound) []PortRange {
	ports := r.ports
	for _, rail := range rails {
		if rail.layer < r.layer {
			ports = intersectPorts(ports, rail.ports)
		}
	}
	return ports
}

// rails answers for each layer with a guardrail which ports it leaves open at
// the current prefix.
func (c *compiler) rails() []flatBound {
	var out []flatBound
	for i, l := range c.layers {
		if l.Policy.Guardrail == nil {
			continue
		}
		rail := flatBound{layer: i}
		for _, b := range c.bounds {
			if b.layer == i && b.active > 0 {
				rail.ports = append(rail.ports, b.ports...)
			}
		}
		rail.ports = mergePorts(rail.ports)
		out = append(out, rail)
	}
	return out
}

func (c *compiler) tooMany(p netip.Prefix, steps []PortRule) {
	var names []string
	var last flatRule
	for _, s := range steps {
		if s.Rule == NoRule {
			continue
		}
		last = c.rules[s.Rule]
		ref := c.prog.Rules[s.Rule]
		if n := ref.Tenant + "/" + ref.Name; !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	c.add(c.layers[last.layer], last.rule.Line,
		"%s takes more than %d port ranges to decide: join port ranges or rules, or split the prefix; it is covered by %s",
		p, MaxPortRules, strings.Join(names, ", "))
}
