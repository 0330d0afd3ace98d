// SPDX-License-Identifier: Apache-2.0

package tenant

import (
	"fmt"
	"strings"
)

// MaxDepth is how many segments a Path may have.
const MaxDepth = 5

// maxSegment is how long one segment may be.
const maxSegment = 40

// Path names a tenant: organisation, team, project and so on, joined by
// slashes, as in acme/vision/train. Make one with ParsePath.
type Path string

// ParsePath checks s and makes it a Path.
func ParsePath(s string) (Path, error) {
	if s == "" {
		return "", fmt.Errorf("tenant path is empty: write an organisation, or organisation/team")
	}
	segments := strings.Split(s, "/")
	if len(segments) > MaxDepth {
		return "", fmt.Errorf("tenant path %.80q has %d parts, at most %d are allowed", s, len(segments), MaxDepth)
	}
	for _, seg := range segments {
		if why := badSegment(seg); why != "" {
			return "", fmt.Errorf("tenant path %.80q: %s", s, why)
		}
	}
	return Path(s), nil
}

// badSegment says what is wrong with a segment, or "".
func badSegment(seg string) string {
	if seg == "" {
		return "has an empty part (a slash at an end, or two together)"
	}
	if len(seg) > maxSegment {
		return fmt.Sprintf("part %.50q is %d characters long, at most %d are allowed", seg, len(seg), maxSegment)
	}
	for _, c := range seg {
		switch {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-':
		case c >= 'A' && c <= 'Z':
			return fmt.Sprintf("part %q has upper-case letters, write %q", seg, strings.ToLower(seg))
		default:
			return fmt.Sprintf("part %q has the character %q, only a-z, 0-9 and - are allowed", seg, c)
		}
	}
	if seg[0] == '-' || seg[len(seg)-1] == '-' {
		return fmt.Sprintf("part %q must begin and end with a letter or a digit", seg)
	}
	return ""
}

// Parent is the path one level up, "" for an organisation.
func (p Path) Parent() Path {
	i := strings.LastIndexByte(string(p), '/')
	if i < 0 {
		return ""
	}
	return p[:i]
}

// Ancestors lists the paths above p, the organisation first, without p.
func (p Path) Ancestors() []Path {
	var out []Path
	for i, c := range p {
		if c == '/' {
			out = append(out, p[:i])
		}
	}
	return out
}

// Contains says whether q is p or lies below it. The empty path contains
// nothing.
func (p Path) Contains(q Path) bool {
	return p != "" && (p == q || strings.HasPrefix(string(q), string(p)+"/"))
}

// Depth is the number of segments: 1 for an organisation.
func (p Path) Depth() int {
	if p == "" {
		return 0
	}
	return 1 + strings.Count(string(p), "/")
}
