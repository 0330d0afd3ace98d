// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Compile folds a chain of layers, ancestors first, into one Program.
//
// It refuses layers that Parse would not have made, an allow rule of which
// some target or port lies wholly outside an ancestor's guardrail, and a
// prefix whose decision takes more than MaxPortRules steps. What lies partly
// outside a guardrail is cut down to it. Errors are *Error, joined if there
// are several.
func Compile(layers []Layer) (Program, error) {
	c := compiler{layers: layers}
	c.number()
	if len(c.errs) == 0 {
		c.checkGuardrails()
	}
	if err := joinErrors(c.errs); err != nil {
		return Program{}, err
	}
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
	layers []Layer
	errs   []*Error
	prog   Program

	rules  []flatRule // by rule ID
	bounds []flatBound
	// byPrefix: what begins and what ends at a prefix.
	byPrefix map[netip.Prefix]*marks
	prefixes []netip.Prefix // keys of byPrefix, sorted
}

type flatRule struct {
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
			c.rules = append(c.rules, flatRule{layer: i, rule: r, ports: mergePorts(ports)})
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
	if targets > MaxTargets {
		c.add(last, 0, "%s has %d targets and exceptions together with its ancestors, at most %d are allowed", last.Tenant, targets, MaxTargets)
	}
	for i, r := range c.rules {
		c.prog.Rules = append(c.prog.Rules, RuleRef{
			ID: uint16(i), Tenant: c.layers[r.layer].Tenant, Name: r.rule.Name, Action: r.rule.Action,
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

// checkLayer refuses what Parse cannot make, so that a policy built by other
// means cannot mean something that the kernel would understand otherwise.
func (c *compiler) checkLayer(l Layer) {
	if l.Policy.Mode != ModeEnforce {
		c.add(l, 0, "policy of %s has unknown %s", l.Tenant, l.Policy.Mode)
	}
	for _, r := range l.Policy.Rules {
		what := fmt.Sprintf("rule %q of %s", r.Name, l.Tenant)
		if r.Name == "" {
			c.add(l, r.Line, "a rule of %s has no name", l.Tenant)
		}
		if r.Action != Allow && r.Action != Deny {
			c.add(l, r.Line, "%s has unknown %s", what, r.Action)
		}
		if len(r.Ports) == 0 && r.Action != Deny {
			c.add(l, r.Line, "%s has no ports", what)
		}
		c.checkTargets(l, r.Line, what, r.To)
		c.checkPorts(l, r.Line, what, r.Ports)
	}
	if g := l.Policy.Guardrail; g != nil {
		for _, b := range g.Bounds {
			what := "a guardrail bound of " + l.Tenant
			if len(b.Ports) == 0 {
				c.add(l, b.Line, "%s has no ports", what)
			}
			c.checkTargets(l, b.Line, what, b.To)
			c.checkPorts(l, b.Line, what, b.Ports)
		}
	}
}

func (c *compiler) checkTargets(l Layer, line int, what string, to []Target) {
	if len(to) == 0 {
		c.add(l, line, "%s has no targets", what)
	}
	for _, t := range to {
		if why := badPrefix(t.CIDR); why != "" {
			c.add(l, line, "%s: cidr %s %s", what, t.CIDR, why)
			continue
		}
		for _, e := range t.Except {
			if why := badPrefix(e); why != "" {
				c.add(l, line, "%s: except %s %s", what, e, why)
			} else if !covers(t.CIDR, e) || e == t.CIDR {
				c.add(l, line, "%s: except %s does not lie inside %s", what, e, t.CIDR)
			}
		}
	}
}

func (c *compiler) checkPorts(l Layer, line int, what string, ports []PortRange) {
	for _, r := range ports {
		if r.Lo > r.Hi || (r.Proto != TCP && r.Proto != UDP) {
			c.add(l, line, "%s: bad port range %d-%d/%s", what, r.Lo, r.Hi, r.Proto)
		}
	}
}

// checkGuardrails refuses allow rules that an ancestor's guardrail makes
// useless in part: a person who wrote them believes that they work.
func (c *compiler) checkGuardrails() {
	for _, r := range c.rules {
		if r.rule.Action != Allow {
			continue
		}
		for _, ancestor := range c.layers[:r.layer] {
			if ancestor.Policy.Guardrail != nil {
				c.checkGuardrail(r, ancestor)
			}
		}
	}
}

func (c *compiler) checkGuardrail(r flatRule, ancestor Layer) {
	l, g := c.layers[r.layer], ancestor.Policy.Guardrail
	outside := func(line int, what string) {
		if line == 0 {
			line = r.rule.Line
		}
		c.add(l, line, "rule %q of %s: %s is outside the guardrail of %s (%s)",
			r.rule.Name, l.Tenant, what, ancestor.Tenant, place(ancestor, g.Line))
	}
	inside := make([]bool, len(r.ports))
	whole := true
	for _, t := range r.rule.To {
		reached, usable := false, false
		for _, b := range g.Bounds {
			if !slices.ContainsFunc(b.To, func(bt Target) bool { return overlap(t, bt) }) {
				continue
			}
			reached = true
			for i, p := range r.ports {
				if len(intersectPorts([]PortRange{p}, b.Ports)) > 0 {
					inside[i], usable = true, true
				}
			}
		}
		if !reached {
			outside(t.Line, t.CIDR.String())
		} else if !usable {
			outside(t.Line, fmt.Sprintf("%s at %s", t.CIDR, joinPorts(r.ports)))
		}
		whole = whole && reached && usable
	}
	for i, ok := range inside {
		if whole && !ok {
			outside(0, r.ports[i].String())
		}
	}
}

// overlap says whether two targets have a prefix in common that neither
// excepts.
func overlap(a, b Target) bool {
	if !a.CIDR.Overlaps(b.CIDR) {
		return false
	}
	common := a.CIDR
	if b.CIDR.Bits() > common.Bits() {
		common = b.CIDR
	}
	excepts := func(e netip.Prefix) bool { return covers(e, common) }
	return !slices.ContainsFunc(a.Except, excepts) && !slices.ContainsFunc(b.Except, excepts)
}

func joinPorts(ports []PortRange) string {
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
	for _, p := range c.prefixes {
		for len(stack) > 0 && !covers(stack[len(stack)-1].prefix, p) {
			stack[len(stack)-1].leave()
			stack = stack[:len(stack)-1]
		}
		f := frame{prefix: p}
		f.enter(c.byPrefix[p])
		f.ports = c.decide(p)
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

// decide answers the steps for addresses whose longest prefix is p, from the
// rules and bounds that are active now: denies first, and without the steps
// that an earlier one hides.
func (c *compiler) decide(p netip.Prefix) []PortRule {
	var steps []PortRule
	var hidden []PortRange // merged ports of steps
	rails := c.rails()
	for _, action := range []Action{Deny, Allow} {
		for id, r := range c.rules {
			if r.active == 0 || r.rule.Action != action {
				continue
			}
			for _, ports := range r.within(rails) {
				if portsCover(hidden, ports) {
					continue
				}
				steps = append(steps, PortRule{
					Lo: ports.Lo, Hi: ports.Hi, Proto: ports.Proto, Deny: action == Deny, Rule: uint16(id),
				})
				hidden = mergePorts(append(hidden, ports))
			}
			if len(steps) > MaxPortRules {
				c.tooMany(p, steps)
				return nil
			}
		}
	}
	return steps
}

// within answers the ports of the rule that the guardrails before it leave. A
// deny rule needs no leave.
func (r flatRule) within(rails []flatBound) []PortRange {
	ports := r.ports
	for _, rail := range rails {
		if r.rule.Action == Allow && rail.layer < r.layer {
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
	for _, s := range steps {
		ref := c.prog.Rules[s.Rule]
		if n := ref.Tenant + "/" + ref.Name; !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	last := c.rules[steps[len(steps)-1].Rule]
	c.add(c.layers[last.layer], last.rule.Line,
		"%s takes more than %d port ranges to decide: join port ranges or rules, or split the prefix; it is covered by %s",
		p, MaxPortRules, strings.Join(names, ", "))
}
