// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/agext/levenshtein"
	"go.yaml.in/yaml/v3"
)

// Bounds of a document. None of them is reached by a policy that a person
// can read.
const (
	maxDepth  = 16 // of nested lists and mappings
	maxErrors = 20 // listed; more are counted
	maxShown  = 60 // characters of a faulty value
)

// Document is one YAML document that is read strictly: unknown and repeated
// keys, anchors, aliases, tags and second documents are errors. It collects
// every error with its line, so that a person fixes a file in one go.
//
// Tenant files hold policies, so package tenant reads them with it too.
// Every method accepts a nil or unfit node, records the error and answers the
// zero value; call Err once at the end.
type Document struct {
	Root *yaml.Node // a mapping
	file string
	errs []*Error
}

// ReadDocument parses data. The error, if any, is an *Error or several joined.
func ReadDocument(file string, data []byte) (*Document, error) {
	d := &Document{file: file}
	if len(data) > MaxPolicyBytes {
		d.add(0, "is %d bytes long, at most %d are read", len(data), MaxPolicyBytes)
		return nil, d.Err()
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc yaml.Node
	if err := dec.Decode(&doc); err != nil {
		if errors.Is(err, io.EOF) {
			d.add(0, "is empty")
		} else {
			d.addSyntax(data, err)
		}
		return nil, d.Err()
	}
	var second yaml.Node
	switch err := dec.Decode(&second); {
	case err == nil:
		d.add(second.Line, "starts a second document: write one document a file")
	case !errors.Is(err, io.EOF):
		d.addSyntax(data, err)
	}
	d.refuse(&doc, 0)
	if len(d.errs) == 0 && doc.Content[0].Kind != yaml.MappingNode {
		d.Errorf(doc.Content[0], "must be a mapping that begins with a kind, not %s", describe(doc.Content[0]))
	}
	if err := d.Err(); err != nil {
		return nil, err
	}
	d.Root = doc.Content[0]
	return d, nil
}

// refuse records the parts of YAML that would let a document mean something
// else than it shows.
func (d *Document) refuse(n *yaml.Node, depth int) {
	switch {
	case depth > maxDepth:
		d.Errorf(n, "is nested more than %d deep", maxDepth)
		return
	case n.Kind == yaml.AliasNode:
		d.Errorf(n, "alias *%s: aliases are not allowed, write the value out", clip(n.Value))
		return
	case n.Anchor != "":
		d.Errorf(n, "anchor &%s: anchors are not allowed, write the value where it is used", clip(n.Anchor))
	case n.Style&yaml.TaggedStyle != 0:
		d.Errorf(n, "tag %s: tags are not allowed", clip(n.Tag))
	}
	for _, c := range n.Content {
		d.refuse(c, depth+1)
	}
}

// Errorf records an error at a node.
func (d *Document) Errorf(at *yaml.Node, format string, args ...any) {
	line := 0
	if at != nil {
		line = at.Line
	}
	d.add(line, format, args...)
}

func (d *Document) add(line int, format string, args ...any) {
	d.errs = append(d.errs, &Error{File: d.file, Line: line, Msg: fmt.Sprintf(format, args...)})
}

var (
	syntaxLine   = regexp.MustCompile(`^line (\d+): `)
	parserError  = regexp.MustCompile(`^did not find expected (node content|key|'|<)`)
	leadingColon = regexp.MustCompile(`[:,\[] *::`)
	leadingStar  = regexp.MustCompile(`[:,\[] *\*\*?\.`)
)

// addSyntax takes the line out of the parser's own words, and explains the
// mistakes that IPv6 and names invite.
func (d *Document) addSyntax(data []byte, err error) {
	msg, line := strings.TrimPrefix(err.Error(), "yaml: "), 0
	if m := syntaxLine.FindStringSubmatch(msg); m != nil {
		line, _ = strconv.Atoi(m[1]) // digits only; out of range leaves 0
		msg = msg[len(m[0]):]
		if parserError.MatchString(msg) {
			line++ // yaml counts lines from 0 in these, from 1 in its scanner's
		}
	}
	switch {
	case leadingStar.Match(data):
		msg += ` (a value that begins with a star, such as "*.example.com", needs quotes)`
	case leadingColon.Match(data):
		msg += " (a value that begins with a colon, such as ::/0, needs quotes)"
	}
	d.add(line, "not valid YAML: %s", msg)
}

// Err answers what was recorded, in the order of the lines: nil, one *Error or
// several joined.
func (d *Document) Err() error { return joinErrors(d.errs) }

func joinErrors(errs []*Error) error {
	if len(errs) == 0 {
		return nil
	}
	errs = slices.Clone(errs)
	slices.SortStableFunc(errs, func(a, b *Error) int {
		if c := strings.Compare(a.File, b.File); c != 0 {
			return c
		}
		return a.Line - b.Line
	})
	if len(errs) == 1 {
		return errs[0]
	}
	var out []error
	for _, e := range errs[:min(len(errs), maxErrors)] {
		out = append(out, e)
	}
	if n := len(errs) - maxErrors; n > 0 {
		out = append(out, &Error{File: errs[0].File, Msg: fmt.Sprintf("and %d more errors", n)})
	}
	return errors.Join(out...)
}

// Fields are the values of a mapping by key.
type Fields map[string]*yaml.Node

// Fields reads a mapping. what names it in errors, as in `rule "web"`.
func (d *Document) Fields(n *yaml.Node, what string, known ...string) Fields {
	f := Fields{}
	if n == nil || n.Kind != yaml.MappingNode {
		d.Errorf(n, "%s must be a mapping, not %s", what, describe(n))
		return f
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		switch {
		case key.Kind != yaml.ScalarNode || key.Tag != "!!str":
			d.Errorf(key, "%s has a key that is not a word: %s", what, describe(key))
		case !slices.Contains(known, key.Value):
			d.Errorf(key, "unknown key %q in %s%s", clip(key.Value), what, Suggest(key.Value, known))
		case f[key.Value] != nil:
			d.Errorf(key, "key %q is in %s twice, first on line %d", key.Value, what, f[key.Value].Line)
		default:
			f[key.Value] = value
		}
	}
	return f
}

// Kind reads the kind key of a mapping, which must be one of known; else it
// answers "".
func (d *Document) Kind(n *yaml.Node, known ...string) string {
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value != "kind" {
			continue
		}
		kind, ok := d.Text(n.Content[i+1], "kind")
		if ok && !slices.Contains(known, kind) {
			d.Errorf(n.Content[i+1], "unknown kind %q%s", clip(kind), Suggest(kind, known))
			return ""
		}
		return kind
	}
	d.Errorf(n, `kind is missing: write "kind: %s"`, known[0])
	return ""
}

// Text reads a scalar that is text.
func (d *Document) Text(n *yaml.Node, what string) (string, bool) {
	if n == nil || n.Kind != yaml.ScalarNode || n.Tag != "!!str" {
		d.Errorf(n, "%s must be text, not %s", what, describe(n))
		return "", false
	}
	return n.Value, true
}

// Scalar reads any scalar as it is written, a number included.
func (d *Document) Scalar(n *yaml.Node, what string) (string, bool) {
	if n == nil || n.Kind != yaml.ScalarNode || n.Tag == "!!null" {
		d.Errorf(n, "%s must be a value, not %s", what, describe(n))
		return "", false
	}
	return n.Value, true
}

// List reads a list. An absent one is the caller's to judge; an empty value
// ("to:" and nothing after it) is an error.
func (d *Document) List(n *yaml.Node, what string) ([]*yaml.Node, bool) {
	if n == nil || n.Kind != yaml.SequenceNode {
		d.Errorf(n, "%s must be a list, not %s", what, describe(n))
		return nil, false
	}
	return n.Content, true
}

// describe says what a node is, for a person who wrote something else.
func describe(n *yaml.Node) string {
	switch {
	case n == nil:
		return "nothing"
	case n.Kind == yaml.MappingNode:
		return "a mapping"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	case n.Tag == "!!null":
		return "empty"
	case n.Tag == "!!int", n.Tag == "!!float":
		return "the number " + clip(n.Value)
	case n.Tag == "!!bool":
		return "the truth value " + clip(n.Value)
	}
	return strconv.Quote(clip(n.Value))
}

// Suggest ends a message about an unknown name: with the nearest known one,
// or with all of them.
func Suggest(name string, known []string) string {
	best, bestDistance := "", 3
	if len(name) <= maxShown {
		for _, k := range known {
			dist := levenshtein.Distance(strings.ToLower(name), strings.ToLower(k), nil)
			if dist < bestDistance && dist < len(k) {
				best, bestDistance = k, dist
			}
		}
	}
	if best != "" {
		return fmt.Sprintf(": did you mean %q?", best)
	}
	return ": known are " + strings.Join(known, ", ")
}

// clip shortens what a file holds before it goes into a message.
func clip(s string) string {
	if r := []rune(s); len(r) > maxShown {
		return string(r[:maxShown]) + "..."
	}
	return s
}
